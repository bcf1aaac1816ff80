"""Operations on one row between two matrix products: norm, activation, conversion, quantisation.

Addresses and counts are as in `machine`. The length of a row is given in vectors of 16 numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels.machine import integer, offset
from headrace.worker.engine.cpu.kernels.matmul import GROUP

_i8, _f4 = types.int64, types.float32

# Adding this to a small float32 leaves its nearest integer, plus 128, in the lowest byte.
_ROUND = 1.5 * 2.0**23 + 128.0


@m.intrinsic([_i8], types.voidptr)
def pointer(b: Any, address: Any) -> Any:
    """Convert an address to a pointer, for numba's carray."""
    return b.inttoptr(address, ir.IntType(8).as_pointer())


def _add(b: Any) -> Any:
    return lambda left, right: b.fadd(left, right)


def _magnitude(b: Any, value: Any) -> Any:
    """Return the bits of the magnitudes, as integers: these have the order of the numbers, NaN last."""
    return b.and_(b.bitcast(value, m.INTS), m.ints(0x7FFFFFFF))


def _largest(b: Any) -> Any:
    return lambda left, right: b.select(b.icmp_signed(">", left, right), left, right)


@m.intrinsic([_i8, _i8], _f4)
def sum_of_squares(b: Any, x: Any, vectors: Any) -> Any:
    """Return the sum of squares of x."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = m.load(b, offset(b, x, i, 64), m.FLOATS)
        return [m.fma(b, value, value, carried[0])]

    (total,) = m.counted_loop(b, vectors, [m.floats(0.0)], body)
    return m.reduce(b, total, _add(b))


@m.intrinsic([_i8, _f4, _i8, _i8, _i8])
def scale_row(b: Any, x: Any, factor: Any, weights: Any, vectors: Any, out: Any) -> None:
    """Store x * factor * weights in out."""
    factors = m.splat(b, factor)

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = b.fmul(m.load(b, offset(b, x, i, 64), m.FLOATS), factors)
        value = b.fmul(value, m.load(b, offset(b, weights, i, 64), m.FLOATS))
        m.store(b, offset(b, out, i, 64), value)
        return []

    m.counted_loop(b, vectors, [], body)


@m.intrinsic([_i8, _i8, _i8, _i8])
def rotate_vector(b: Any, x: Any, cosines: Any, sines: Any, vectors: Any) -> None:
    """Rotate each pair of numbers of x, in place: the first halves of pairs are followed by the second."""
    second = m.offset(b, x, vectors, 64)

    def body(i: Any, carried: list[Any]) -> list[Any]:
        places = [offset(b, start, i, 64) for start in (x, second)]
        left, right = (m.load(b, place, m.FLOATS) for place in places)
        cosine, sine = (m.load(b, offset(b, start, i, 64), m.FLOATS) for start in (cosines, sines))
        m.store(b, places[0], b.fsub(b.fmul(left, cosine), b.fmul(right, sine)))
        m.store(b, places[1], b.fadd(b.fmul(right, cosine), b.fmul(left, sine)))
        return []

    m.counted_loop(b, vectors, [], body)


@m.intrinsic([_i8, _i8, _i8, _i8])
def silu_row(b: Any, gate: Any, up: Any, vectors: Any, out: Any) -> None:
    """Store gate * sigmoid(gate) * up in out."""

    def some(begin: Any, together: int) -> Any:
        def body(i: Any, carried: list[Any]) -> list[Any]:
            at = b.add(begin, b.mul(i, integer(64 * together)))
            places = [b.add(at, integer(64 * j)) for j in range(together)]
            gates = [m.load(b, b.add(gate, place), m.FLOATS) for place in places]
            # The range of exp ends at 87, where the sigmoid is 0 already.
            bounded = []
            for value in gates:
                negative = b.fsub(m.floats(0.0), value)
                above = b.fcmp_ordered(">", negative, m.floats(87.0))
                bounded.append(b.select(above, m.floats(87.0), negative))
            for place, value, power in zip(places, gates, m.exp_all(b, bounded), strict=True):
                value = b.fdiv(value, b.fadd(m.floats(1.0), power))
                value = b.fmul(value, m.load(b, b.add(up, place), m.FLOATS))
                m.store(b, b.add(out, place), value)
            return []

        return body

    whole, rest = b.lshr(vectors, integer(2)), b.and_(vectors, integer(3))
    with b.if_then(b.icmp_signed(">", whole, integer(0))):
        m.counted_loop(b, whole, [], some(integer(0), 4))
    with b.if_then(b.icmp_signed(">", rest, integer(0))):
        m.counted_loop(b, rest, [], some(b.mul(whole, integer(256)), 1))


@m.intrinsic([_i8, _i8, _i8, _i8])
def quantise_row(b: Any, x: Any, groups: Any, out: Any, scales: Any) -> None:
    """Store x as bytes with an offset of 128, and a scale for each group of 64.

    A group that holds infinity or NaN gets a scale that is not finite, and so do its results.
    """
    bytes_ = ir.VectorType(m.I8, m.LANES)
    each = GROUP // m.LANES

    def body(group: Any, carried: list[Any]) -> list[Any]:
        start = offset(b, x, group, 4 * GROUP)
        values = [m.load(b, b.add(start, integer(64 * i)), m.FLOATS) for i in range(each)]
        largest = _magnitude(b, values[0])
        for value in values[1:]:
            largest = _largest(b)(largest, _magnitude(b, value))
        highest = b.bitcast(m.reduce(b, largest, _largest(b)), m.F32)
        scale = b.fdiv(highest, ir.Constant(m.F32, 127.0))
        m.store(b, offset(b, scales, group, 4), scale)
        one, zero = ir.Constant(m.F32, 1.0), ir.Constant(m.F32, 0.0)
        # Below this the inverse overflows; such numbers are treated as 0.
        usable = b.fcmp_ordered(">", scale, ir.Constant(m.F32, 2.0**-120))
        factor = m.splat(b, b.select(usable, b.fdiv(one, scale), zero))
        place = offset(b, out, group, GROUP)
        for i, value in enumerate(values):
            rounded = b.bitcast(m.fma(b, value, factor, m.floats(_ROUND)), m.INTS)
            m.store(b, b.add(place, integer(m.LANES * i)), b.trunc(rounded, bytes_), 1)
        return []

    m.counted_loop(b, groups, [], body)


@m.intrinsic([_i8, _i8, _i8])
def bfloat16_row(b: Any, x: Any, vectors: Any, out: Any) -> None:
    """Store x as bfloat16, rounded to nearest even, in out."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = m.load(b, offset(b, x, i, 64), m.FLOATS)
        m.store(b, offset(b, out, i, 2 * m.LANES), m.narrow(b, value), 2)
        return []

    m.counted_loop(b, vectors, [], body)


@m.intrinsic([_i8, _i8, _i8])
def copy_row(b: Any, x: Any, vectors: Any, out: Any) -> None:
    """Store x in out."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        m.store(b, offset(b, out, i, 64), m.load(b, offset(b, x, i, 64), m.FLOATS))
        return []

    m.counted_loop(b, vectors, [], body)


@m.intrinsic([_i8, _i8, _i8])
def widen_row(b: Any, x: Any, vectors: Any, out: Any) -> None:
    """Store the bfloat16 numbers x as float32 in out."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        shorts = m.load(b, offset(b, x, i, 2 * m.LANES), m.SHORTS, 2)
        m.store(b, offset(b, out, i, 64), m.widen(b, shorts))
        return []

    m.counted_loop(b, vectors, [], body)


@m.jit
def pack_row(element_type: int, x: int, length: int, out: int, scales: int) -> None:
    """Convert a row to activations for `matmul`, and for int8 also store the scales of its groups.

    x        address of [length] float32
    out      address of the row in the activations
    scales   address of [length / 64] float32
    """
    if element_type == 0:
        quantise_row(x, length // GROUP, out, scales)
    elif element_type == 1:
        bfloat16_row(x, length // 16, out)
    else:
        copy_row(x, length // 16, out)
