"""A worker process with the dice engine: `python -m tests.faults.dice_worker --engine echo ...`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from headrace.runtime.serving.server import run, until_signal
from headrace.runtime.telemetry import logs
from headrace.worker.__main__ import engine_loop, with_faults, worker
from headrace.worker.engine.interface import Engine
from headrace.worker.runner import Runner
from headrace.worker.sequences import SequenceKey
from headrace.worker.settings import Settings
from tests.faults.dice import DiceEngine


async def main(settings: Settings, wrap: Callable[[DiceEngine], Engine]) -> None:
    """Serve until a signal arrives.

    wrap   makes the worker's engine of a dice engine
    """

    def load() -> Runner[SequenceKey]:
        engine = wrap(
            DiceEngine(
                context_length=settings.context_length or 4096,
                max_running=settings.running_sequences,
                step_seconds=settings.fake_step_seconds,
            )
        )
        return with_faults(engine_loop(engine, settings), settings)

    async with worker(settings, load, f"{socket.gethostname()}-{os.getpid()}"):
        await until_signal()


def start(program: str, wrap: Callable[[DiceEngine], Engine]) -> None:
    """Run a worker with the settings of the command line."""
    settings = Settings.load(program=f"python -m {program}")
    logs.configure("worker", settings.log_level)
    run(main(settings, wrap))


if __name__ == "__main__":
    start("tests.faults.dice_worker", lambda engine: engine)
