"""Kernels are compiled once for all processes of a machine, and only when they are needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

IMPORT = "import headrace.worker.engine.cpu.kernels.compiling"
# A kernel that compiles quickly stands for all. numba caches only functions of files.
KERNEL = """
import sys

import numba

from headrace.worker.engine.cpu.kernels.cache import compile_entry_point, is_compiled


def kernel(data):
    pass


if __name__ == "__main__":
    cached = is_compiled(kernel)
    print(cached, compile_entry_point(kernel).cache_hits)
"""


def start(cache: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env={"HEADRACE_CACHE": str(cache), "PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.strip()


def test_importing_the_kernels_writes_nothing(tmp_path: Path) -> None:
    printed(start(tmp_path / "cache", "-c", IMPORT))

    assert not (tmp_path / "cache").exists()


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(KERNEL)

    together = [start(tmp_path / "cache", str(program)) for _ in range(3)]

    hits = sorted(printed(process).split()[1] for process in together)
    assert hits == ["0", "1", "1"]
    assert printed(start(tmp_path / "cache", str(program))) == "True 1"
