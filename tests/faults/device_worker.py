"""A worker process with the dice engine behind an asynchronous device, which runs one step ahead.

`python -m tests.faults.device_worker --engine echo ...`.
"""

from __future__ import annotations

from tests.faults.dice_worker import start
from tests.worker.engine.plan.device import DeviceEngine

if __name__ == "__main__":
    start("tests.faults.device_worker", DeviceEngine)
