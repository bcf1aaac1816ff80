"""Compute kernels for the CPU, compiled by numba when a worker first starts and cached after that.

`machine` emits vector instructions, `matmul`, `attention` and `elementwise` are the operations, `team` runs
them on torch's own OpenMP threads, `forward` strings them together into one step of a model. Nothing
here imports torch: tensors come in as addresses.

Why not torch's operators: a step of a small model is 400 calls of some microseconds' overhead each, and
oneDNN's int8 product reaches half of what the same instructions give here. Every kernel computes a row
in an order that depends on the row alone, so its bits are the same alone, in a batch and in a chunk.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numba

from headrace.models import cache_folder

# Whether kernels check where they read and write: for debugging, as it takes time.
CHECKED = os.environ.get("HEADRACE_CHECK_KERNELS", "") not in ("", "0")


def _compiled() -> str:
    """Return the folder for compiled kernels, another one for each version of their source.

    numba looks only at the file of the function that it caches, not at those of the functions it calls.
    """
    digest = hashlib.sha256(b"checked" if CHECKED else b"")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    folder = cache_folder() / "kernels" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError:  # a read-only home: compile at each start
        return tempfile.mkdtemp(prefix="headrace-kernels-")


numba.config.BOUNDSCHECK = 1 if CHECKED else None
if "NUMBA_CACHE_DIR" not in os.environ or CHECKED:
    numba.config.CACHE_DIR = _compiled()
