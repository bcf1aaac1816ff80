"""Multiply the queries of a tile by the keys of a block, and its attention weights by the values.

Each function handles 1 to MAX_QUERY_ROWS rows, with as many accumulators as the registers hold. While a
kernel computes, it prefetches the memory that is read next. `kv_layout` describes the operands.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels.kv_layout import BLOCK
from headrace.worker.engine.cpu.kernels.machine import integer, offset

KEY_TILE = 4 * BLOCK  # keys between two updates of the running maximum
MAX_QUERY_ROWS = 12  # rows of a tile: tokens x heads of a group

_i8 = types.int64


def _multiply_word(b: Any, half: bool, acc: Any, own: Any, words: Any) -> Any:
    """Add to 16 sums the products of 16 words and one word, which fills every lane of *own*."""
    if half:
        return m.dot_bf16(b, acc, own, words)
    return m.fma(b, b.bitcast(own, m.FLOATS), b.bitcast(words, m.FLOATS), acc)


def _prefetch(b: Any, address: Any, index: Any) -> None:
    """Prefetch 128 bytes: one word of 32 keys, or of 32 columns of values."""
    for line in (0, 64):
        m.prefetch(b, b.add(offset(b, address, index, 128), integer(line)), level=2)


def _scores(rows: int, half: bool) -> Any:
    """Make the kernel that multiplies *rows* queries by a block's keys.

    Arguments: queries [rows, words]; keys [words, 32 words]; words; out [rows, 32] float32, rows KEY_TILE
    numbers apart; and an address to prefetch as many bytes from as the keys take.
    """

    def emit(b: Any, queries: Any, keys: Any, words: Any, out: Any, ahead: Any) -> None:
        starts = [offset(b, queries, b.mul(words, integer(r)), 4) for r in range(rows)]

        def body(word: Any, sums: list[Any]) -> list[Any]:
            _prefetch(b, ahead, word)
            at = offset(b, keys, word, 128)
            found = [m.load(b, b.add(at, integer(64 * i)), m.INTS) for i in (0, 1)]
            new = []
            for r, start in enumerate(starts):
                own = m.splat(b, m.load(b, offset(b, start, word, 4), m.I32))
                new += [_multiply_word(b, half, sums[2 * r + i], own, found[i]) for i in (0, 1)]
            return new

        sums = m.counted_loop(b, words, [m.floats(0.0)] * (2 * rows), body)
        for i, value in enumerate(sums):
            m.store(b, b.add(out, integer(4 * KEY_TILE * (i // 2) + 64 * (i % 2))), value)

    return m.make_intrinsic([_i8] * 5, emit)


def _weigh(rows: int, half: bool, vectors: int) -> Any:
    """Make the kernel that adds the weighted values of some blocks to *rows* sums of 16 x *vectors* columns.

    Arguments: weights [rows, words], rows 4 KEY_TILE bytes apart; the number of visible tokens; the addresses
    of the values of the blocks, [words, value_dim words] each; the offset of the first column in a row of
    them; value_dim; sums [rows, value_dim] float32, which are multiplied by factors [rows] float32 before;
    and the addresses of as many blocks to prefetch.
    """

    def emit(
        b: Any, weights: Any, tokens: Any, blocks: Any, column: Any, value_dim: Any, sums: Any, factors: Any,
        aheads: Any,
    ) -> None:  # fmt: skip
        places, carried = [], []
        for r in range(rows):
            start = offset(b, sums, b.mul(value_dim, integer(r)), 4)
            places += [b.add(start, integer(64 * i)) for i in range(vectors)]
            factor = m.splat(b, m.load(b, b.add(factors, integer(4 * r)), m.F32))
            carried += [b.fmul(m.load(b, place, m.FLOATS), factor) for place in places[-vectors:]]
        words = BLOCK // 2 if half else BLOCK

        def add_block(block: Any, so_far: list[Any]) -> list[Any]:
            values = b.add(m.load(b, offset(b, blocks, block, 8), m.I64), column)
            ahead = b.add(m.load(b, offset(b, aheads, block, 8), m.I64), b.mul(column, integer(words)))
            left = b.sub(tokens, b.mul(block, integer(BLOCK)))
            left = b.select(b.icmp_signed("<", left, integer(BLOCK)), left, integer(BLOCK))
            own = offset(b, weights, block, 4 * words)

            def body(word: Any, held: list[Any]) -> list[Any]:
                _prefetch(b, ahead, word)
                at = offset(b, values, b.mul(word, value_dim), 4)
                found = [m.load(b, b.add(at, integer(64 * i)), m.INTS) for i in range(vectors)]
                if half:
                    # After an odd number of tokens, the next may be NaN, which a weight of 0 does not cancel.
                    both = b.icmp_signed("<", b.add(b.add(word, word), integer(1)), left)
                    keep = b.select(both, ir.Constant(m.I32, -1), ir.Constant(m.I32, 0xFFFF))
                    found = [b.and_(numbers, m.splat(b, keep)) for numbers in found]
                new = []
                for r in range(rows):
                    place = offset(b, b.add(own, integer(4 * KEY_TILE * r)), word, 4)
                    weight = m.splat(b, m.load(b, place, m.I32))
                    new += [
                        _multiply_word(b, half, held[vectors * r + i], weight, found[i])
                        for i in range(vectors)
                    ]
                return new

            count = b.lshr(b.add(left, integer(1)), integer(1)) if half else left
            return m.counted_loop(b, count, so_far, body)

        count = b.lshr(b.add(tokens, integer(BLOCK - 1)), integer(BLOCK.bit_length() - 1))
        for place, value in zip(places, m.counted_loop(b, count, carried, add_block), strict=True):
            m.store(b, place, value)

    return m.make_intrinsic([_i8] * 8, emit)


def _dispatch(name: str, make: Any, arguments: int) -> Any:
    """Make a function for 1 to 12 rows from the kernels for 1, 2, 3, 4, 6, 7, 8 and 12 rows."""
    k1, k2, k3, k4, k6, k7, k8, k12 = (make(rows) for rows in (1, 2, 3, 4, 6, 7, 8, 12))
    names = ", ".join(f"a{i}" for i in range(arguments))
    lines = [f"def {name}(rows, {names}):"]
    for rows in (1, 2, 3, 4, 6, 7, 8):
        lines += [f"    if rows <= {rows}:", f"        k{rows}({names})", "        return"]
    lines.append(f"    k12({names})")
    scope = {"k1": k1, "k2": k2, "k3": k3, "k4": k4, "k6": k6, "k7": k7, "k8": k8, "k12": k12}
    return m.jit_source(name, lines, __name__, scope)


score_half = _dispatch("score_half", lambda rows: _scores(rows, True), 5)
score_full = _dispatch("score_full", lambda rows: _scores(rows, False), 5)
weigh_half = _dispatch("weigh_half", lambda rows: _weigh(rows, True, 2), 8)
weigh_full = _dispatch("weigh_full", lambda rows: _weigh(rows, False, 2), 8)
weigh_half_last = _dispatch("weigh_half_last", lambda rows: _weigh(rows, True, 1), 8)
weigh_full_last = _dispatch("weigh_full_last", lambda rows: _weigh(rows, False, 1), 8)
