"""Everything that happens to one row between two products: norms, rotation, activation, quantisation.

Addresses and counts as in `machine`; a row's length is given in vectors of 16 and must fill them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types

from headrace.worker.engine.kernels import machine as m
from headrace.worker.engine.kernels.machine import offset

_i8, _f4 = types.int64, types.float32

# Adding this to a small float32 leaves its nearest integer, plus 128, in the lowest byte.
_ROUND = 1.5 * 2.0**23 + 128.0


@m.emitted([_i8], types.voidptr)
def pointer(b: Any, address: Any) -> Any:
    """Return an address as a pointer, for numba's carray."""
    return b.inttoptr(address, ir.IntType(8).as_pointer())


def _add(b: Any) -> Any:
    return lambda left, right: b.fadd(left, right)


def _largest(b: Any) -> Any:
    # A NaN on the left wins, one on the right is lost: the new value stands left.
    return lambda left, right: b.select(b.fcmp_unordered(">", left, right), left, right)


def _magnitude(b: Any, value: Any) -> Any:
    return m.call(b, f"llvm.fabs.v{m.LANES}f32", value)


@m.emitted([_i8, _i8], _f4)
def sum_of_squares(b: Any, x: Any, vectors: Any) -> Any:
    """Return the sum of the squares of x."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = m.load(b, offset(b, x, i, 64), m.FLOATS)
        return [m.fma(b, value, value, carried[0])]

    (total,) = m.counted_loop(b, vectors, [m.floats(0.0)], body)
    return m.reduce(b, total, _add(b))


@m.emitted([_i8, _f4, _i8, _i8, _i8], _f4)
def scale_row(b: Any, x: Any, factor: Any, weights: Any, vectors: Any, out: Any) -> Any:
    """Store x x factor x weights in out; return the largest magnitude."""
    factors = m.splat(b, factor)

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = b.fmul(m.load(b, offset(b, x, i, 64), m.FLOATS), factors)
        value = b.fmul(value, m.load(b, offset(b, weights, i, 64), m.FLOATS))
        m.store(b, offset(b, out, i, 64), value)
        return [_largest(b)(_magnitude(b, value), carried[0])]

    (largest,) = m.counted_loop(b, vectors, [m.floats(0.0)], body)
    return m.reduce(b, largest, _largest(b))


@m.emitted([_i8, _i8, _i8, _i8], _f4)
def silu_row(b: Any, gate: Any, up: Any, vectors: Any, out: Any) -> Any:
    """Store gate x sigmoid(gate) x up in out; return the largest magnitude."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = m.load(b, offset(b, gate, i, 64), m.FLOATS)
        # exp's range ends at 88, where the sigmoid has long been 0.
        negative = b.fsub(m.floats(0.0), value)
        bounded = b.select(b.fcmp_ordered(">", negative, m.floats(87.0)), m.floats(87.0), negative)
        value = b.fdiv(value, b.fadd(m.floats(1.0), m.exp(b, bounded)))
        value = b.fmul(value, m.load(b, offset(b, up, i, 64), m.FLOATS))
        m.store(b, offset(b, out, i, 64), value)
        return [_largest(b)(_magnitude(b, value), carried[0])]

    (largest,) = m.counted_loop(b, vectors, [m.floats(0.0)], body)
    return m.reduce(b, largest, _largest(b))


@m.emitted([_i8, _i8], _f4)
def largest_of(b: Any, x: Any, vectors: Any) -> Any:
    """Return the largest magnitude in x."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = _magnitude(b, m.load(b, offset(b, x, i, 64), m.FLOATS))
        return [_largest(b)(value, carried[0])]

    (largest,) = m.counted_loop(b, vectors, [m.floats(0.0)], body)
    return m.reduce(b, largest, _largest(b))


@m.emitted([_i8, _f4, _i8, _i8])
def quantise_row(b: Any, x: Any, factor: Any, vectors: Any, out: Any) -> None:
    """Store x x factor, rounded to integers and 128 added, as bytes in out."""
    factors = m.splat(b, factor)
    bytes_ = ir.VectorType(m.I8, m.LANES)

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = m.load(b, offset(b, x, i, 64), m.FLOATS)
        rounded = b.bitcast(m.fma(b, value, factors, m.floats(_ROUND)), m.INTS)
        m.store(b, offset(b, out, i, m.LANES), b.trunc(rounded, bytes_), 1)
        return []

    m.counted_loop(b, vectors, [], body)


@m.emitted([_i8, _i8, _i8])
def bfloat16_row(b: Any, x: Any, vectors: Any, out: Any) -> None:
    """Store x in bfloat16, rounded to nearest even, in out."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = m.load(b, offset(b, x, i, 64), m.FLOATS)
        m.store(b, offset(b, out, i, 2 * m.LANES), m.narrow(b, value), 2)
        return []

    m.counted_loop(b, vectors, [], body)


@m.emitted([_i8, _i8, _i8])
def copy_row(b: Any, x: Any, vectors: Any, out: Any) -> None:
    """Store x in out."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        m.store(b, offset(b, out, i, 64), m.load(b, offset(b, x, i, 64), m.FLOATS))
        return []

    m.counted_loop(b, vectors, [], body)


@m.emitted([_i8, _i8, _i8])
def widen_row(b: Any, x: Any, vectors: Any, out: Any) -> None:
    """Store the bfloat16 numbers x as float32 in out."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        shorts = m.load(b, offset(b, x, i, 2 * m.LANES), m.SHORTS, 2)
        m.store(b, offset(b, out, i, 64), m.widen(b, shorts))
        return []

    m.counted_loop(b, vectors, [], body)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def pack_row(kind: int, x: int, largest: float, length: int, out: int, scales: int) -> None:
    """Store a row as `matmul` wants its activations, and for int8 its scale.

    x, out    addresses: [length] float32; the row's place among the activations
    largest   the largest magnitude in x
    scales    address of the row's scale, float32
    """
    if kind == 0:
        # A row of zeros has any scale. An infinite or NaN one leaves a NaN scale, and so NaN results.
        scale = largest / types.float32(127.0)
        store_float(scales, scale)
        inverse = types.float32(0.0)
        if scale > types.float32(0.0):
            inverse = types.float32(1.0) / scale
        quantise_row(x, inverse, length // 16, out)
    elif kind == 1:
        bfloat16_row(x, length // 16, out)
    elif x != out:
        copy_row(x, length // 16, out)


@m.emitted([_i8, _f4])
def store_float(b: Any, address: Any, value: Any) -> None:
    """Store one float32."""
    m.store(b, address, value)


@m.emitted([_i8], _f4)
def load_float(b: Any, address: Any) -> Any:
    """Load one float32."""
    return m.load(b, address, m.F32)
