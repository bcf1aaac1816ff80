"""Vector instructions that have two forms, compared with each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from headrace.worker.engine.cpu.kernels import machine


def _converting(narrow: Any) -> Any:
    def emit(b: Any, values: Any, out: Any) -> None:
        machine.store(b, out, narrow(b, machine.load(b, values, machine.FLOATS)), 2)

    return machine.make_intrinsic([types.int64, types.int64], emit)


_narrow, _narrow_normal = _converting(machine.narrow), _converting(machine.narrow_normal)


@njit  # type: ignore[untyped-decorator]
def convert(values: int, plain: int, normal: int, vectors: int) -> None:
    for i in range(vectors):
        _narrow(values + 64 * i, plain + 32 * i)
        _narrow_normal(values + 64 * i, normal + 32 * i)


def test_normal_numbers_round_to_the_same_bfloat16_with_and_without_the_instruction() -> None:
    """Workers with and without avx512_bf16 resume each other's answers."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    values[~np.isfinite(values) | (np.abs(values) < np.finfo(np.float32).tiny)] = 0
    plain, normal = np.zeros((2, len(values)), np.uint16)

    convert(values.ctypes.data, plain.ctypes.data, normal.ctypes.data, len(values) // machine.LANES)

    assert np.array_equal(plain, normal)
