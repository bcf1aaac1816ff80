"""Find the least score of the tokens that filters leave, and collect those tokens.

It is found by bisection over the bits of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels import vector_math
from headrace.worker.engine.cpu.kernels.machine import integer, offset

_i8, _f4 = types.int64, types.float32

_INFINITY_BITS = 0x7F800000


@m.intrinsic([_i8, _i8, _f4], _i8)
def mass_of(b: Any, x: Any, vectors: Any, largest: Any) -> Any:
    """Return the sum of the weights of x - largest."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = b.fsub(m.load(b, offset(b, x, i, 64), m.FLOATS), m.splat(b, largest))
        return [b.add(carried[0], vector_math.weight(b, value))]

    return m.reduce(b, m.counted_loop(b, vectors, [_no_weights()], body)[0], b.add)


@m.intrinsic([_i8, _i8, _i8])
def weigh(b: Any, x: Any, vectors: Any, out: Any) -> None:
    """Store the weights of x in out."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        m.store(b, offset(b, out, i, 128), vector_math.weight(b, m.load(b, offset(b, x, i, 64), m.FLOATS)), 8)
        return []

    m.counted_loop(b, vectors, [], body)


def _no_weights() -> Any:
    return ir.Constant(vector_math.WEIGHTS, [0] * m.LANES)


@m.intrinsic([_i8, _i8, _f4], _i8)
def _count_from(b: Any, x: Any, vectors: Any, least: Any) -> Any:
    """Return how many numbers of x are at least *least*."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        within = b.fcmp_ordered(">=", m.load(b, offset(b, x, i, 64), m.FLOATS), m.splat(b, least))
        return [b.sub(carried[0], b.sext(within, m.INTS))]

    return b.sext(m.reduce(b, m.counted_loop(b, vectors, [m.ints(0)], body)[0], b.add), m.I64)


@m.intrinsic([_i8, _i8, _i8, _f4], _i8)
def _mass_from(b: Any, x: Any, weights: Any, vectors: Any, least: Any) -> Any:
    """Return the sum of the weights of the numbers of x that are at least *least*."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        within = b.fcmp_ordered(">=", m.load(b, offset(b, x, i, 64), m.FLOATS), m.splat(b, least))
        weight = m.load(b, offset(b, weights, i, 128), vector_math.WEIGHTS, 8)
        return [b.add(carried[0], b.select(within, weight, _no_weights()))]

    return m.reduce(b, m.counted_loop(b, vectors, [_no_weights()], body)[0], b.add)


@m.intrinsic([_i8], _f4)
def _score_of(b: Any, bits: Any) -> Any:
    """Return the score, 0 or negative, whose absolute value has these bits."""
    negative = b.or_(b.trunc(bits, m.I32), ir.Constant(m.I32, -(1 << 31)))
    return b.bitcast(negative, m.F32)


@m.jit
def _kth(x: int, vectors: int, k: int) -> Any:
    """Return the k-th greatest of the scores x, which are at least k."""
    low = 0
    for bit in range(30, -1, -1):
        if _count_from(x, vectors, _score_of(min(low + (1 << bit) - 1, _INFINITY_BITS))) < k:
            low += 1 << bit
    return _score_of(low)


@m.jit
def _least_of_mass(x: int, weights: int, vectors: int, target: float) -> Any:
    """Return the greatest score such that the scores which reach it have the mass *target*; all have it."""
    low = 0
    for bit in range(30, -1, -1):
        least = _score_of(min(low + (1 << bit) - 1, _INFINITY_BITS))
        if float(_mass_from(x, weights, vectors, least)) < target:
            low += 1 << bit
    return _score_of(low)


@m.jit
def least_of(x: int, weights: int, count: int, top_k: int, top_p: float, total: int) -> Any:
    """Return the least score that top-k and top-p keep; NaN if the *count* scores x do not suffice to know.

    x         scores, followed by -inf up to a multiple of 16
    weights   of x
    total     mass of all scores, if top_k is 0
    """
    vectors = (count + m.LANES - 1) // m.LANES
    least = np.float32(-np.inf)
    if top_k > 0:
        if count < top_k:
            return np.float32(np.nan)
        least = _kth(x, vectors, top_k)
        total = _mass_from(x, weights, vectors, least)
    if top_p < 1:
        target = top_p * float(total)
        if float(_mass_from(x, weights, vectors, np.float32(-np.inf))) < target:
            return np.float32(np.nan)
        least = max(least, _least_of_mass(x, weights, vectors, target))
    return least


@m.jit
def few_likeliest(x: int, vectors: int, most: int) -> Any:
    """Return a score which about, and at most, *most* scores of x reach; NaN if there is none."""
    low = 0
    for bit in range(30, -1, -1):
        if low + (1 << bit) > _INFINITY_BITS:
            continue
        count = _count_from(x, vectors, _score_of(low + (1 << bit)))
        if count <= most:
            low += 1 << bit
            if 2 * count >= most:
                break
    least = _score_of(low)
    return least if _count_from(x, vectors, least) <= most else np.float32(np.nan)


@m.intrinsic([_i8, _i8, _f4, _i8, _i8], _i8)
def collect(b: Any, x: Any, vectors: Any, least: Any, found: Any, ids: Any) -> Any:
    """Copy the scores of at least *least*, and their tokens; return how many. Pads with -inf and token 0.

    found, ids   addresses of [16 x (vectors + 1)] float32 and int32
    """
    lanes = ir.Constant(m.INTS, list(range(m.LANES)))

    def body(i: Any, carried: list[Any]) -> list[Any]:
        count = carried[0]
        score = m.load(b, offset(b, x, i, 64), m.FLOATS)
        within = b.fcmp_ordered(">=", score, m.splat(b, least))
        place = b.add(lanes, m.splat(b, b.trunc(b.mul(i, integer(m.LANES)), m.I32)))
        # Whole vectors are stored: the next ones overwrite what is too much.
        for out, values, kind in ((found, score, "f32"), (ids, place, "i32")):
            nothing = ir.Constant(values.type, ir.Undefined)
            name = f"llvm.experimental.vector.compress.v{m.LANES}{kind}"
            packed = m.call(b, name, values, within, nothing)
            m.store(b, offset(b, out, count, 4), packed)
        added = m.call(b, "llvm.ctpop.i16", b.bitcast(within, m.I16))
        return [b.add(count, b.zext(added, m.I64))]

    (count,) = m.counted_loop(b, vectors, [integer(0)], body)
    m.store(b, offset(b, found, count, 4), m.floats(float("-inf")))
    m.store(b, offset(b, ids, count, 4), m.ints(0))
    return count
