"""Update the softmax of one query with the scores of the next keys.

A query keeps a running maximum and sum (Milakov & Gimelshein, Online normalizer calculation for softmax,
2018; the loop of FlashAttention).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels.machine import integer, offset

_i8, _f4 = types.int64, types.float32


def _softmax(
    half: bool, b: Any, scores: Any, vectors: Any, first: Any, end: Any, softcap: Any, state: Any
) -> Any:
    """Replace the scores of a query by weights, in place, and update its state.

    scores    [16 x vectors] float32; those from *first* to before *end* are visible. For bfloat16 memory,
              weights are bfloat16 and fill the first half of the space
    state     the running maximum and sum, float32

    Returns the factor for the weighted values of earlier keys.
    """
    lanes = ir.Constant(m.INTS, list(range(m.LANES)))
    low, high = (m.splat(b, b.trunc(bound, m.I32)) for bound in (first, end))
    capped = b.fcmp_ordered(">", softcap, ir.Constant(m.F32, 0.0))
    # Without a cap, the division must still be finite.
    cap = m.splat(b, b.select(capped, softcap, ir.Constant(m.F32, 1.0)))

    def larger(left: Any, right: Any) -> Any:
        return b.select(b.fcmp_ordered(">", left, right), left, right)

    def mask(i: Any, carried: list[Any]) -> list[Any]:
        place = offset(b, scores, i, 64)
        value = m.load(b, place, m.FLOATS)
        with b.if_else(capped) as (then, otherwise):
            with then:
                bounded = b.fmul(_tanh(b, b.fdiv(value, cap)), cap)
                capped_block = b.block
            with otherwise:
                other_block = b.block
        chosen = b.phi(m.FLOATS)
        chosen.add_incoming(bounded, capped_block)
        chosen.add_incoming(value, other_block)
        lane = b.add(lanes, m.splat(b, b.trunc(b.mul(i, integer(m.LANES)), m.I32)))
        visible = b.and_(b.icmp_signed(">=", lane, low), b.icmp_signed("<", lane, high))
        value = b.select(visible, chosen, m.floats(float("-inf")))
        m.store(b, place, value)
        return [larger(value, carried[0])]

    def compare(i: Any, carried: list[Any]) -> list[Any]:
        return [larger(m.load(b, offset(b, scores, i, 64), m.FLOATS), carried[0])]

    # Most tiles of a long context are visible as a whole.
    all_visible = b.and_(
        b.icmp_signed("<=", first, integer(0)),
        b.icmp_signed(">=", end, b.mul(vectors, integer(m.LANES))),
    )
    found = []
    with b.if_else(b.and_(all_visible, b.not_(capped))) as branches:
        for branch, body in zip(branches, (compare, mask), strict=True):
            with branch:
                (value,) = m.counted_loop(b, vectors, [m.floats(-1e30)], body)
                found.append((value, b.block))
    highest = b.phi(m.FLOATS)
    for value, block in found:
        highest.add_incoming(value, block)
    before = m.load(b, state, m.F32)
    maximum = larger(before, m.reduce(b, highest, larger))
    highest = m.splat(b, maximum)

    def weigh(i: Any, carried: list[Any]) -> list[Any]:
        place = offset(b, scores, i, 64)
        weight = m.exp(b, b.fsub(m.load(b, place, m.FLOATS), highest))
        if half:
            # Weights take half the space of scores: no score is overwritten before it is read.
            rounded = m.narrow_normal(b, weight)
            m.store(b, offset(b, scores, i, 32), rounded)
            weight = m.widen(b, rounded)
        else:
            m.store(b, place, weight)
        return [b.fadd(carried[0], weight)]

    (total,) = m.counted_loop(b, vectors, [m.floats(0.0)], weigh)
    decay = b.extract_element(m.exp(b, b.fsub(m.splat(b, before), highest)), ir.Constant(m.I32, 0))
    so_far = b.fmul(m.load(b, b.add(state, integer(4)), m.F32), decay)
    m.store(b, state, maximum)
    m.store(b, b.add(state, integer(4)), b.fadd(so_far, m.reduce(b, total, lambda x, y: b.fadd(x, y))))
    return decay


softmax_half = m.make_intrinsic([_i8, _i8, _i8, _i8, _f4, _i8], partial(_softmax, True), _f4)
softmax_full = m.make_intrinsic([_i8, _i8, _i8, _i8, _f4, _i8], partial(_softmax, False), _f4)


def _tanh(b: Any, x: Any) -> Any:
    bounded = b.select(b.fcmp_ordered(">", x, m.floats(20.0)), m.floats(20.0), x)
    twice = m.exp(b, b.fadd(bounded, bounded))
    return b.fsub(m.floats(1.0), b.fdiv(m.floats(2.0), b.fadd(twice, m.floats(1.0))))
