"""The device of the tests in this folder: a GPU if there is one, else a CPU with Triton's interpreter.

With the plugin of `tests.worker.engine.gpu.ptx` it is a CPU that runs what kernels compile to.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.interpreter import set_up_interpreter

HAS_CUDA = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda", 0) if HAS_CUDA else torch.device("cpu")

EMULATED = not HAS_CUDA and os.environ.get("TRITON_INTERPRET") == "0"

# The interpreter multiplies matrices of bfloat16 wrongly.
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if HAS_CUDA or EMULATED else ()))

needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device, or a torch built without CUDA")

if HAS_CUDA:
    # Triton's own default. A loaded engine would set a folder that only its test has.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    set_up_interpreter()
