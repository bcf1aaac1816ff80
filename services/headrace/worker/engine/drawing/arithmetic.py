"""`fixed_math` and `noise` as torch operations: equal numbers, in every bit, on any device.

Each operation is a kernel of its own, which rounds its result: nothing is fused.
"""

from __future__ import annotations

import torch

from headrace.worker.engine import fixed_math as exact
from headrace.worker.engine.noise import GOLDEN, MIX_FIRST, MIX_SECOND

_LOW_HALF = 0xFFFF


def log(x: torch.Tensor) -> torch.Tensor:
    """Return the natural logarithm of positive, normal float32 numbers."""
    bits = x.view(torch.int32) + (exact.ONE_BITS - exact.SQRT_HALF_BITS)
    exponent = ((bits >> 23) - 127).float()
    f = ((bits & exact.MANTISSA) + exact.SQRT_HALF_BITS).view(torch.float32) - 1
    square = f * f
    y = _polynomial(exact.LOG_POLYNOMIAL, f).mul_(f).mul_(square)
    y += exponent * exact.LN2_LOW
    y -= square.mul_(0.5)
    return f.add_(y).add_(exponent.mul_(exact.LN2_HIGH))


def weight(x: torch.Tensor) -> torch.Tensor:
    """Return the exponential of float32 numbers up to 0, in units of 1 / WEIGHT_ONE, rounded down, int64."""
    above = x > exact.EXP_LEAST
    inside = x.clamp(min=exact.EXP_LEAST)
    rounded = inside * exact.LOG2_E + exact.ROUND
    whole = rounded - exact.ROUND
    r = inside.sub_(whole * exact.LN2_HIGH).sub_(whole.mul_(exact.LN2_LOW))
    power = (rounded.view(torch.int32) - (exact.ROUND_BITS - 127)) << 23
    found = _polynomial(exact.EXP_POLYNOMIAL, r).mul_(power.view(torch.float32)).mul_(float(exact.WEIGHT_ONE))
    return found.mul_(above).long()


def gumbel(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise, see `noise.gumbel`.

    keys   [rows, 2] int32, from `noise.noise_keys`
    ids    [rows or 1, tokens] int32, the token of each number

    Returns [rows, tokens] float32.
    """
    bits = (ids * _signed(GOLDEN)) ^ keys[:, :1]
    bits = _mix(_mix(bits).bitwise_xor_(keys[:, 1:]))
    uniform = ((bits >> 9) & exact.MANTISSA).float().add_(0.5).mul_(2.0**-23)
    return log(log(uniform).neg_()).neg_()


def _mix(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ ((bits >> 16) & _LOW_HALF)).mul_(_signed(MIX_FIRST))
    bits ^= (bits >> 13) & (1 << 19) - 1
    bits *= _signed(MIX_SECOND)
    return bits.bitwise_xor_((bits >> 16) & _LOW_HALF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    result = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        result.mul_(x).add_(coefficient)
    return result
