"""Update the softmax of the queries of a tile with the scores of the next keys.

A query keeps a running maximum and sum (Milakov & Gimelshein, Online normalizer calculation for softmax,
2018; the loop of FlashAttention). The lanes of a vector are reduced for all queries at once: one reduction
after another would wait for its own results most of the time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels.machine import integer, offset

_i8, _f4 = types.int64, types.float32

# The state of a tile: for each of 16 queries the running maximum, the running sum, and the factor for the
# weighted values of earlier keys; float32.
TOTALS, DECAYS, STATE_BYTES = (4 * m.LANES * i for i in (1, 2, 3))

# A vector for each of 16 queries, with what remains to be reduced.
PARTIAL_BYTES = 4 * m.LANES * m.LANES

TOGETHER = 4  # vectors of weights that are computed together
_FEW = 4  # queries that a cheaper reduction handles


def _larger(b: Any, left: Any, right: Any) -> Any:
    return b.select(b.fcmp_ordered(">", left, right), left, right)


@m.intrinsic([_i8, _i8, _i8, _i8, _f4, _i8])
def highest(b: Any, scores: Any, vectors: Any, first: Any, end: Any, softcap: Any, out: Any) -> None:
    """Store 16 maxima of the scores of a query; replace scores by capped ones, and hidden ones by -infinity.

    scores    [16 x vectors] float32; those from *first* to before *end* are visible
    out       [16] float32
    """
    lanes = ir.Constant(m.INTS, list(range(m.LANES)))
    low, high = (m.splat(b, b.trunc(bound, m.I32)) for bound in (first, end))
    capped = b.fcmp_ordered(">", softcap, ir.Constant(m.F32, 0.0))
    # Without a cap, the division must still be finite.
    cap = m.splat(b, b.select(capped, softcap, ir.Constant(m.F32, 1.0)))

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
        return [_larger(b, value, carried[0])]

    def compare(i: Any, carried: list[Any]) -> list[Any]:
        return [_larger(b, m.load(b, offset(b, scores, i, 64), m.FLOATS), carried[0])]

    # Most tiles of a long context are visible as a whole.
    all_visible = b.and_(
        b.icmp_signed("<=", first, integer(0)),
        b.icmp_signed(">=", end, b.mul(vectors, integer(m.LANES))),
    )
    with b.if_else(b.and_(all_visible, b.not_(capped))) as branches:
        for branch, body in zip(branches, (compare, mask), strict=True):
            with branch:
                (value,) = m.counted_loop(b, vectors, [m.floats(-1e30)], body)
                m.store(b, out, value)


@m.intrinsic([_i8, _i8, _i8])
def raise_maxima(b: Any, rows: Any, partials: Any, state: Any) -> None:
    """Update the maxima of *rows* queries of a tile, and compute the factors for earlier values.

    partials  what `highest` has stored for each query
    state     address of STATE_BYTES
    """
    before = m.load(b, state, m.FLOATS)
    maxima = _larger(b, before, _reduce(b, rows, partials, partial(_larger, b)))
    m.store(b, state, maxima)
    m.store(b, b.add(state, integer(DECAYS)), m.exp(b, b.fsub(before, maxima)))


def _weigh(half: bool, b: Any, rows: Any, scores: Any, row_bytes: Any, vectors: Any, partials: Any,
           state: Any) -> None:  # fmt: skip
    """Replace the scores of *rows* queries by weights, in place, and store 16 sums of those of each query.

    scores    [rows, 16 x vectors] float32, rows *row_bytes* apart. For bfloat16 memory, weights are bfloat16
              and fill the first half of the space of a row
    vectors   a multiple of TOGETHER
    partials  [rows, 16] float32; receives the sums
    """

    def weigh_row(row: Any, _: list[Any]) -> list[Any]:
        start = b.add(scores, b.mul(row, row_bytes))
        maximum = m.splat(b, m.load(b, offset(b, state, row, 4), m.F32))

        def weigh(index: Any, carried: list[Any]) -> list[Any]:
            at = offset(b, start, index, 64 * TOGETHER)
            scores = [m.load(b, b.add(at, integer(64 * i)), m.FLOATS) for i in range(TOGETHER)]
            weights = m.exp_all(b, [b.fsub(score, maximum) for score in scores])
            if half:
                # Weights take half the space of scores: no score is overwritten before it is read.
                rounded = [m.narrow_normal(b, weight) for weight in weights]
                at = offset(b, start, index, 32 * TOGETHER)
                for i, weight in enumerate(rounded):
                    m.store(b, b.add(at, integer(32 * i)), weight)
                weights = [m.widen(b, weight) for weight in rounded]
            else:
                for i, weight in enumerate(weights):
                    m.store(b, b.add(at, integer(64 * i)), weight)
            total = carried[0]
            for weight in weights:
                total = b.fadd(total, weight)
            return [total]

        (total,) = m.counted_loop(b, b.udiv(vectors, integer(TOGETHER)), [m.floats(0.0)], weigh)
        m.store(b, offset(b, partials, row, 64), total)
        return []

    m.counted_loop(b, rows, [], weigh_row)


weigh_scores_half = m.make_intrinsic([_i8] * 6, partial(_weigh, True))
weigh_scores_full = m.make_intrinsic([_i8] * 6, partial(_weigh, False))


@m.intrinsic([_i8, _i8, _i8])
def add_totals(b: Any, rows: Any, partials: Any, state: Any) -> None:
    """Add the weights of the keys to the sums of *rows* queries of a tile, see `raise_maxima`."""
    decays = m.load(b, b.add(state, integer(DECAYS)), m.FLOATS)
    so_far = b.fmul(m.load(b, b.add(state, integer(TOTALS)), m.FLOATS), decays)
    added = _reduce(b, rows, partials, lambda left, right: b.fadd(left, right))
    m.store(b, b.add(state, integer(TOTALS)), b.fadd(so_far, added))


def _reduce(b: Any, rows: Any, partials: Any, combine: Any) -> Any:
    """Return a vector with the combined lanes of each of *rows* vectors."""
    found = []
    with b.if_else(b.icmp_signed("<=", rows, integer(_FEW))) as branches:
        for branch, count in zip(branches, (_FEW, m.LANES), strict=True):
            with branch:
                vectors = [m.load(b, b.add(partials, integer(64 * i)), m.FLOATS) for i in range(count)]
                found.append((m.reduce_rows(b, vectors, combine), b.block))
    value = b.phi(m.FLOATS)
    for reduced, block in found:
        value.add_incoming(reduced, block)
    return value


def _tanh(b: Any, x: Any) -> Any:
    bounded = b.select(b.fcmp_ordered(">", x, m.floats(20.0)), m.floats(20.0), x)
    twice = m.exp(b, b.fadd(bounded, bounded))
    return b.fsub(m.floats(1.0), b.fdiv(m.floats(2.0), b.fadd(twice, m.floats(1.0))))
