"""Make the results of Triton's interpreter, which runs kernels without a GPU, the same on every CPU."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import numpy as np


@cache
def multiply_reproducibly() -> None:
    """Let the interpreter, if it is in use, sum products in float64.

    It multiplies matrices by numpy, whose sums depend on the shapes of the matrices on some CPUs. Rounded
    from float64, they do not, so that exact engines are exact.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        return
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        if a.data.dtype not in (np.float16, np.float32):
            return multiply(self, a, b, d, *more)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
