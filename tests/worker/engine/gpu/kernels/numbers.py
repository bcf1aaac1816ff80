"""Comparison of what kernels compute with a reference."""

from __future__ import annotations

import torch

# The largest relative error of a few operations whose results are rounded to a dtype once or twice.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def close(seen: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether the norm of the difference is small. *seen* may be on another device."""
    error = (seen.cpu().double() - expected.double()).norm()
    return seen.dtype is expected.dtype and bool(error <= TOLERANCE[seen.dtype] * expected.double().norm())
