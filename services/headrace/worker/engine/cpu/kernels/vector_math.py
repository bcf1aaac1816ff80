"""The functions of `fixed_math` and `noise` as vector instructions: 16 lanes, equal in every bit."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from headrace.worker.engine import fixed_math as fixed
from headrace.worker.engine import noise
from headrace.worker.engine.cpu.kernels import machine as m

WEIGHTS = ir.VectorType(m.I64, m.LANES)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _polynomial(b: Any, coefficients: tuple[float, ...], x: Any) -> Any:
    result = m.floats(coefficients[0])
    for coefficient in coefficients[1:]:
        result = b.fadd(b.fmul(result, x), m.floats(coefficient))
    return result


def log(b: Any, x: Any) -> Any:
    """Return `fixed_math.log` of each lane."""
    bits = b.add(b.bitcast(x, m.INTS), m.ints(fixed.ONE_BITS - fixed.SQRT_HALF_BITS))
    exponent = b.sitofp(b.sub(b.ashr(bits, m.ints(23)), m.ints(127)), m.FLOATS)
    mantissa = b.add(b.and_(bits, m.ints(fixed.MANTISSA)), m.ints(fixed.SQRT_HALF_BITS))
    f = b.fsub(b.bitcast(mantissa, m.FLOATS), m.floats(1.0))
    square = b.fmul(f, f)
    y = b.fmul(b.fmul(_polynomial(b, fixed.LOG_POLYNOMIAL, f), f), square)
    y = b.fadd(y, b.fmul(exponent, m.floats(fixed.LN2_LOW)))
    y = b.fsub(y, b.fmul(square, m.floats(0.5)))
    return b.fadd(b.fadd(f, y), b.fmul(exponent, m.floats(fixed.LN2_HIGH)))


def weight(b: Any, x: Any) -> Any:
    """Return `fixed_math.weight` of each lane, as 64-bit integers."""
    usable = b.fcmp_ordered(">", x, m.floats(fixed.EXP_LEAST))
    inside = b.select(usable, x, m.floats(fixed.EXP_LEAST))
    rounded = b.fadd(b.fmul(inside, m.floats(fixed.LOG2_E)), m.floats(fixed.ROUND))
    whole = b.fsub(rounded, m.floats(fixed.ROUND))
    r = b.fsub(inside, b.fmul(whole, m.floats(fixed.LN2_HIGH)))
    r = b.fsub(r, b.fmul(whole, m.floats(fixed.LN2_LOW)))
    power = b.shl(b.sub(b.bitcast(rounded, m.INTS), m.ints(fixed.ROUND_BITS - 127)), m.ints(23))
    result = b.fmul(_polynomial(b, fixed.EXP_POLYNOMIAL, r), b.bitcast(power, m.FLOATS))
    result = b.select(usable, result, m.floats(0.0))
    return b.fptosi(b.fmul(result, m.floats(fixed.WEIGHT_ONE)), WEIGHTS)


def gumbel(b: Any, ids: Any, key_first: Any, key_second: Any) -> Any:
    """Return the noise of each lane's token, see `noise.gumbel`; the keys are vectors."""
    bits = b.xor(b.mul(ids, m.ints(_signed(noise.GOLDEN))), key_first)
    bits = _mix(b, b.xor(_mix(b, bits), key_second))
    number = b.sitofp(b.lshr(bits, m.ints(9)), m.FLOATS)
    uniform = b.fmul(b.fadd(number, m.floats(0.5)), m.floats(2.0**-23))
    zero = m.floats(0.0)
    return b.fsub(zero, log(b, b.fsub(zero, log(b, uniform))))


def _mix(b: Any, bits: Any) -> Any:
    bits = b.mul(b.xor(bits, b.lshr(bits, m.ints(16))), m.ints(_signed(noise.MIX_FIRST)))
    bits = b.mul(b.xor(bits, b.lshr(bits, m.ints(13))), m.ints(_signed(noise.MIX_SECOND)))
    return b.xor(bits, b.lshr(bits, m.ints(16)))
