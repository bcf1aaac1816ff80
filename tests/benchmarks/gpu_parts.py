"""Parts that behave as the tests of the runner need it; the model's name says how."""

from __future__ import annotations

import os
import time

from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Shape


def run(report: Report, shape: Shape | None) -> None:
    """Behave."""
    assert shape is None
    report.row("process", os.getpid())
    match report.model:
        case "fails":
            raise ValueError("it failed")
        case "breaks the device":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "dies":
            os._exit(7)
        case "hangs":
            time.sleep(600)
        case "remembers":
            report.fact("answer", 42)
        case "recalls":
            report.row("recalled", report.facts["answer"])
