"""Numbers as PTX types them (ISA, chapter 5). Registers are unsigned numpy arrays, one number per lane."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Lanes: TypeAlias = npt.NDArray[Any]  # [32]: one number per lane of a warp
Mask: TypeAlias = npt.NDArray[np.bool_] | None  # which lanes execute an instruction; None: all

LANES = 32

# numpy has no bfloat16: its bits are kept.
DTYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(np.bool_),
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype(np.uint16),
    "bf16x2": np.dtype(np.uint32),
    "f16x2": np.dtype(np.uint32),
}


def unsigned(size: int) -> np.dtype[Any]:
    """Return the type of bits of this many bytes."""
    return np.dtype(f"u{size}")


def widened(bits: Lanes, kind: str) -> Lanes:
    """Return numbers of 16 bits, f16 or bf16, as float32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(numbers: Lanes, kind: str) -> Lanes:
    """Round float32 to f16 or bf16, to nearest even; return the bits."""
    if kind == "f16":
        return numbers.astype(np.float32).astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
    odd = (bits >> np.uint64(16)) & np.uint64(1)
    rounded = ((bits + np.uint64(0x7FFF) + odd) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded)


def flushed(numbers: Lanes) -> Lanes:
    """Replace subnormal float32 by zeros of their sign, as `.ftz` does."""
    tiny = np.abs(numbers) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), numbers), numbers)
