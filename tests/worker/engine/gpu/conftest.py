"""Tests of GPU code. Without a CUDA device, Triton's interpreter runs the kernels on CPU tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.worker.engine.gpu.device import HAS_CUDA

# Triton has wheels for Linux only.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["*"]


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


if not HAS_CUDA and importlib.util.find_spec("triton"):
    _multiply_reproducibly()

# These compute nothing on a device.
_WITHOUT_DEVICE = ("test_filling", "test_instructions", "test_report", "test_report_attention")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder: with a GPU, they test its kernels and not only their algorithms."""
    for item in items:
        if HAS_CUDA and Path(__file__).parent in item.path.parents and item.path.stem not in _WITHOUT_DEVICE:
            item.add_marker(pytest.mark.cuda)
