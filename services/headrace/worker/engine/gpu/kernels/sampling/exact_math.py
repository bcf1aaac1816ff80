"""The functions of `fixed_math` and `noise` for Triton kernels, equal in every bit.

Kernels that use them are launched with `enable_fp_fusion=False`: a fused multiplication and addition rounds
once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.worker.engine import fixed_math, noise

_LN2_HIGH, _LN2_LOW = tl.constexpr(fixed_math.LN2_HIGH), tl.constexpr(fixed_math.LN2_LOW)
_SQRT_HALF, _MANTISSA = tl.constexpr(fixed_math.SQRT_HALF_BITS), tl.constexpr(fixed_math.MANTISSA)
_TO_SQRT_HALF = tl.constexpr(fixed_math.ONE_BITS - fixed_math.SQRT_HALF_BITS)
_LOG = [tl.constexpr(coefficient) for coefficient in fixed_math.LOG_POLYNOMIAL]
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = _LOG
_EXP = [tl.constexpr(coefficient) for coefficient in fixed_math.EXP_POLYNOMIAL]
_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7 = _EXP
_LOG2_E, _EXP_LEAST = tl.constexpr(fixed_math.LOG2_E), tl.constexpr(fixed_math.EXP_LEAST)
_ROUND = tl.constexpr(fixed_math.ROUND)
_TO_POWER = tl.constexpr(fixed_math.ROUND_BITS - 127)
_WEIGHT_ONE = tl.constexpr(float(fixed_math.WEIGHT_ONE))
_GOLDEN = tl.constexpr(noise.GOLDEN)
_MIX_FIRST, _MIX_SECOND = tl.constexpr(noise.MIX_FIRST), tl.constexpr(noise.MIX_SECOND)
_UNIT = tl.constexpr(2.0**-23)


@triton.jit
def log(x: tl.tensor) -> tl.tensor:
    """Return `fixed_math.log`."""
    bits = x.to(tl.int32, bitcast=True) + _TO_SQRT_HALF
    exponent = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & _MANTISSA) + _SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    y = ((((_L0 * f + _L1) * f + _L2) * f + _L3) * f + _L4) * f + _L5
    y = ((y * f + _L6) * f + _L7) * f + _L8
    y = y * f * square
    y = y + exponent * _LN2_LOW
    y = y - square * 0.5
    return (f + y) + exponent * _LN2_HIGH


@triton.jit
def weight(x: tl.tensor) -> tl.tensor:
    """Return `fixed_math.weight`, int64."""
    usable = x > _EXP_LEAST
    inside = tl.where(usable, x, _EXP_LEAST)
    rounded = inside * _LOG2_E + _ROUND
    whole = rounded - _ROUND
    r = (inside - whole * _LN2_HIGH) - whole * _LN2_LOW
    power = ((rounded.to(tl.int32, bitcast=True) - _TO_POWER) << 23).to(tl.float32, bitcast=True)
    y = (((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4
    y = ((y * r + _E5) * r + _E6) * r + _E7
    return (tl.where(usable, y * power, 0.0) * _WEIGHT_ONE).to(tl.int64)


@triton.jit
def gumbel(ids: tl.tensor, key_first: tl.tensor, key_second: tl.tensor) -> tl.tensor:
    """Return `noise.gumbel` of int32 ids and a key."""
    bits = (ids.to(tl.uint32) * _GOLDEN) ^ key_first.to(tl.uint32)
    bits = _mix(_mix(bits) ^ key_second.to(tl.uint32))
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * _UNIT
    return 0.0 - log(0.0 - log(uniform))


@triton.jit
def _mix(bits: tl.tensor) -> tl.tensor:
    bits = (bits ^ (bits >> 16)) * _MIX_FIRST
    bits = (bits ^ (bits >> 13)) * _MIX_SECOND
    return bits ^ (bits >> 16)
