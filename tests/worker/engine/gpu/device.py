"""The device of the tests in this folder: a GPU if there is one, else a CPU with Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

HAS_CUDA = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda", 0) if HAS_CUDA else torch.device("cpu")

# The interpreter multiplies matrices of bfloat16 wrongly.
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if HAS_CUDA else ()))

needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device, or a torch built without CUDA")


def _multiply_reproducibly() -> None:
    """Let the interpreter sum products in float64.

    It multiplies matrices by numpy, whose sums depend on the shapes of the matrices on some CPUs. Rounded
    from float64, they do not.
    """
    import numpy as np
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        if a.data.dtype not in (np.float16, np.float32):
            return multiply(self, a, b, d, *more)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.create_dot = create_dot


if HAS_CUDA:
    # Triton's own default. A loaded engine would set a folder that only its test has.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        _multiply_reproducibly()
