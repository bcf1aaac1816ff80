"""Logarithm and exponential in float32 as fixed sequences of operations, equal in every bit on every device.

The functions of numpy, torch, CUDA and C libraries differ in the last bit, and then now and then in a sampled
token. Here each result is defined by single multiplications and additions that IEEE 754 rounds, never fused.
This module has the definition in numpy and its constants; `cpu.kernels.sampling` and `gpu.kernels.sampling`
compute the same. The polynomials are those of Cephes (Moshier, logf.c and expf.c), relative errors are below
3e-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# ln 2 as a sum: a product of the first part with a small integer is exact.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4

# log(1 + f) = f - f^2 / 2 + f^3 * polynomial(f), highest power first.
LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SQRT_HALF_BITS = 0x3F3504F3  # of float32: mantissas are reduced to between sqrt(1/2) and sqrt(2)
ONE_BITS = 0x3F800000
MANTISSA = 0x7FFFFF

EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    0.5,
    1.0,
    1.0,
)
LOG2_E = 1.44269504088896341
EXP_LEAST = -87.0  # below this the result is 0
ROUND = 1.5 * 2.0**23  # adding and subtracting it rounds a small float32 to an integer, in its lowest bits
ROUND_BITS = 0x4B400000

# Probabilities are summed as integers, because such a sum does not depend on the order. A likeliest token has
# this weight; at most 2^22 tokens, so that no sum reaches 2^63.
WEIGHT_ONE = 1 << 40


def log(x: Floats) -> Floats:
    """Return the natural logarithm of positive, normal numbers."""
    bits = x.view(np.int32) + np.int32(ONE_BITS - SQRT_HALF_BITS)
    exponent = ((bits >> 23) - 127).astype(np.float32)
    f = ((bits & MANTISSA) + SQRT_HALF_BITS).view(np.float32) - np.float32(1)
    square = f * f
    y = _polynomial(LOG_POLYNOMIAL, f) * f * square
    y = y + exponent * np.float32(LN2_LOW)
    y = y - square * np.float32(0.5)
    return np.asarray((f + y) + exponent * np.float32(LN2_HIGH))


def exp(x: Floats) -> Floats:
    """Return e to the power of numbers up to 0; exactly 1 at 0, and 0 from EXP_LEAST down."""
    inside = np.where(x > EXP_LEAST, x, np.float32(EXP_LEAST))
    rounded = inside * np.float32(LOG2_E) + np.float32(ROUND)
    whole = rounded - np.float32(ROUND)
    r = (inside - whole * np.float32(LN2_HIGH)) - whole * np.float32(LN2_LOW)
    power = (rounded.view(np.int32) - np.int32(ROUND_BITS - 127)) << 23
    return np.where(x > EXP_LEAST, _polynomial(EXP_POLYNOMIAL, r) * power.view(np.float32), np.float32(0))


def weight(x: Floats) -> npt.NDArray[np.int64]:
    """Return the exponential of numbers up to 0, in units of 1 / WEIGHT_ONE, rounded down."""
    return (exp(x) * np.float32(WEIGHT_ONE)).astype(np.int64)


def _polynomial(coefficients: tuple[float, ...], x: Floats) -> Any:
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + np.float32(coefficient)
    return result
