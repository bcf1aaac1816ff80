"""Run the report, which compiles kernels."""

from __future__ import annotations

import subprocess
import sys


def compiled(*arguments: str) -> list[str]:
    """Return the lines of the report, which must accept all variants."""
    # In a process of its own: kernels of this process may be interpreted.
    command = [sys.executable, "-m", "headrace.worker.engine.gpu.kernels.report", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split()[-3:] == ["registers", "spills", "shared"]
    return lines
