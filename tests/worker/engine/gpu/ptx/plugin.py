"""Run tests of kernels on the emulator: `pytest -p tests.worker.engine.gpu.ptx.plugin FILES`.

pytest imports it before the tests: Triton decides when it is imported whether kernels are interpreted. What
is compiled goes to a temporary folder, as it is not for a GPU.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ["TRITON_INTERPRET"] = "0"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

_FOLDER = "HEADRACE_PTX_CACHE"  # set in the processes of a run, which share it
if _FOLDER not in os.environ:
    os.environ[_FOLDER] = tempfile.mkdtemp(prefix="headrace-ptx-")
    atexit.register(shutil.rmtree, os.environ[_FOLDER], ignore_errors=True)
os.environ["TRITON_CACHE_DIR"] = os.environ[_FOLDER]

from headrace.worker.engine.gpu.kernels import matmul, tiling  # noqa: E402  # after the variables are set
from tests.worker.engine.gpu.ptx import driver  # noqa: E402

DRIVER = driver.install()
# The kernels are compiled for this device, with its tiles.
tiling.capability_of = lambda device: driver.CAPABILITY
matmul._major = lambda device: driver.CAPABILITY // 10  # type: ignore[assignment]


def pytest_report_header() -> str:
    """Print how to repeat the run."""
    return f"kernels are emulated, compiled for {driver.CAPABILITY}: {driver.SEED}={DRIVER.seed}"
