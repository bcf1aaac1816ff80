"""Multiply rows by a matrix that was laid out in advance, in int8, bfloat16 or float32.

A matrix [out, in] is divided into panels of 32 outputs. A panel is stored in words of 4 bytes, each with
neighbouring inputs of one output (four int8, two bfloat16 or one float32), so that one instruction
multiplies and adds one word of 16 outputs. A tile is up to 12 rows, with 24 accumulators in registers; in
int8, which accumulates in two stages, it is up to 8 rows.

    panels [out / 32, words, 2, 16, 4 bytes]      words = in x bytes of an element / 4

int8 means 8-bit weights with a scale per output, and 8-bit activations with a scale per row and group of 64
inputs, rounded to nearest. With one scale per row, which outliers determine, the perplexity of SmolLM2 is
5.6 % higher than in float32; with groups it is 0.6 % higher. Activations are stored as unsigned bytes with an
offset of 128, as the instruction requires. The contribution of the offset to the sum of a group is computed
in advance. Sums within a group are exact integers; groups are added in order.

    panels of int8 [out / 32, groups, 64 + 16 x 128 bytes]: 32 int16 with the sums of the weights of
    the group, then the 16 words of the group
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numba import types

from headrace.worker.engine.cpu.kernels import machine as m

PANEL = 2 * m.LANES  # outputs
GROUP = 64  # int8: inputs that share a scale
GROUP_WORDS = GROUP // 4  # per output
_GROUP_BYTES = 64 + 128 * GROUP_WORDS

# The most cache lines of a panel to prefetch. The CPU's own prefetcher reads the rest of a longer one.
_MOST_LINES = 800


class ElementType(IntEnum):
    """The number format of weights and activations in matrix products."""

    INT8 = 0
    BFLOAT16 = 1
    FLOAT32 = 2


ELEMENT_BYTES = {ElementType.INT8: 1, ElementType.BFLOAT16: 2, ElementType.FLOAT32: 4}

# A matrix as kernels receive it. The owners of the addresses must outlive it.
MATRIX = np.dtype(
    [
        ("panels", np.int64),  # address, 64-byte aligned
        ("count", np.int64),  # number of panels
        ("words", np.int64),  # per output
        ("scales", np.int64),  # int8: address of [out] float32
        ("bias", np.int64),  # address of [out] float32; zeros where the layer has none
    ]
)


def _tile(element_type: ElementType, rows: int) -> Any:
    """Make the kernel that multiplies *rows* rows by one panel.

    Arguments: activations and their bytes per row; scales of the activations and their bytes per row; panel;
    words; scales and bias of the panel; results and their bytes per row; 1 to add the results to the existing
    values, else 0; and, for int8, an address to prefetch from and the cache lines to prefetch per group.
    """

    def emit(
        b: Any, a: Any, a_row: Any, a_scales: Any, scales_row: Any, panel: Any, words: Any, scales: Any,
        bias: Any, out: Any, out_row: Any, add: Any, ahead: Any, lines: Any,
    ) -> None:  # fmt: skip
        starts = [b.add(a, b.mul(a_row, m.integer(r))) for r in range(rows)]
        int8 = element_type is ElementType.INT8
        own_scales = [b.add(a_scales, b.mul(scales_row, m.integer(r))) for r in range(rows)] if int8 else []

        def group(index: Any, totals: list[Any]) -> list[Any]:
            own = [m.offset(b, start, index, 4 * GROUP_WORDS) for start in starts]
            if int8:
                _prefetch(b, m.offset(b, ahead, b.mul(index, lines), 64), lines)
                return _scaled_group(
                    b, own, own_scales, m.offset(b, panel, index, _GROUP_BYTES), index, totals
                )
            at = m.offset(b, panel, index, 128 * GROUP_WORDS)
            return m.counted_loop(b, m.integer(GROUP_WORDS), totals, _word(b, element_type, own, at))

        places = [b.add(out, b.mul(out_row, m.integer(r))) for r in range(rows)]
        if int8:
            with b.if_then(b.icmp_signed(">", lines, m.integer(0))):
                # A store waits for the cache lines of those before it, which are rarely in the cache.
                for place in places:
                    for half in (0, 1):
                        m.prefetch(b, b.add(place, m.integer(64 * half)), write=True)
        groups = b.udiv(words, m.integer(GROUP_WORDS))
        sums = m.counted_loop(b, groups, [m.floats(0.0)] * (2 * rows), group)
        adds = b.icmp_signed("!=", add, m.integer(0))
        for half in (0, 1):
            here = m.integer(64 * half)
            offsets = m.load(b, b.add(bias, here), m.FLOATS)
            factors = m.load(b, b.add(scales, here), m.FLOATS) if int8 else None
            for r in range(rows):
                value = sums[2 * r + half]
                value = m.fma(b, value, factors, offsets) if int8 else b.fadd(value, offsets)
                place = b.add(places[r], here)
                # Adding -0.0 changes no number. Results that are only stored are not waited for.
                before = m.load(b, b.select(adds, place, b.add(bias, here)), m.FLOATS)
                m.store(b, place, b.fadd(value, b.select(adds, before, m.floats(-0.0))))

    return m.make_intrinsic([types.int64] * 13, emit)


def _prefetch(b: Any, address: Any, lines: Any) -> None:
    """Prefetch some cache lines, if any."""
    with b.if_then(b.icmp_signed(">", lines, m.integer(0))):

        def body(line: Any, _: list[Any]) -> list[Any]:
            m.prefetch(b, m.offset(b, address, line, 64), level=2)
            return []

        m.counted_loop(b, lines, [], body)


def _word(b: Any, element_type: ElementType, starts: list[Any], panel: Any) -> Any:
    """Make the body of a loop over words: one word of each row times one word of each of 32 outputs."""

    def body(word: Any, sums: list[Any]) -> list[Any]:
        at = m.offset(b, panel, word, 128)
        weights = [m.load(b, b.add(at, m.integer(64 * half)), m.INTS, 64) for half in (0, 1)]
        new = []
        for r, start in enumerate(starts):
            own = m.splat(b, m.load(b, m.offset(b, start, word, 4), m.I32))
            new += [_dot(b, element_type, sums[2 * r + half], own, weights[half]) for half in (0, 1)]
        return new

    return body


def _scaled_group(
    b: Any, starts: list[Any], scales: list[Any], group: Any, index: Any, totals: list[Any]
) -> list[Any]:
    """Add the int8 products of one group, each times the scale of its row and group."""
    excess = []
    for half in (0, 1):
        weights = m.load(b, b.add(group, m.integer(32 * half)), m.SHORTS, 32)
        excess.append(b.sub(m.ints(0), b.shl(b.sext(weights, m.INTS), m.ints(7))))
    word = _word(b, ElementType.INT8, starts, b.add(group, m.integer(64)))
    sums = m.counted_loop(b, m.integer(GROUP_WORDS), excess * len(starts), word)
    new = []
    for r, scale in enumerate(scales):
        factor = m.splat(b, m.load(b, m.offset(b, scale, index, 4), m.F32))
        for half in (0, 1):
            value = b.sitofp(sums[2 * r + half], m.FLOATS)
            new.append(m.fma(b, value, factor, totals[2 * r + half]))
    return new


def _dot(b: Any, element_type: ElementType, acc: Any, own: Any, weights: Any) -> Any:
    if element_type is ElementType.INT8:
        return m.dot_int8(b, acc, own, weights)
    if element_type is ElementType.BFLOAT16:
        return m.dot_bf16(b, acc, own, weights)
    return m.fma(b, b.bitcast(own, m.FLOATS), b.bitcast(weights, m.FLOATS), acc)


def _panel_of(element_type: ElementType) -> Any:
    """Make the function that multiplies any number of rows by one panel, in tiles.

    In int8, each of several tiles prefetches its share of *ahead_lines* cache lines from *ahead*, so that
    memory is read while products are computed: 16 rows take up to a fifth less time. With one tile, memory
    takes longer than the products, and prefetching slows it down. bfloat16 and float32 gain nothing.
    """
    sizes = [1, 2, 3, 4, 6, 8] + [12] * (element_type is not ElementType.INT8)
    most = sizes[-1]
    names = "a, a_row, a_scales, scales_row, panel, words, scales, bias, out, out_row, add"
    name = f"panel_of_{element_type.name.lower()}"
    source = [
        f"def {name}(rows, {names}, ahead, ahead_lines):",
        f"    groups = words // {GROUP_WORDS}",
        f"    tiles = (rows + {most - 1}) // {most}",
        "    lines = (ahead_lines + tiles * groups - 1) // (tiles * groups) if tiles > 1 else 0",
        "    while rows > 0:",
    ]
    for size in reversed(sizes):
        source += [
            f"        {'if' if size == most else 'elif'} rows >= {size}:",
            f"            tile_{size}({names}, ahead, lines)",
            f"            done = {size}",
        ]
    source += [
        "        rows -= done",
        "        a += done * a_row",
        "        a_scales += done * scales_row",
        "        out += done * out_row",
        "        ahead += 64 * groups * lines",
    ]
    scope: dict[str, Any] = {f"tile_{size}": _tile(element_type, size) for size in sizes}
    return m.jit_source(name, source, __name__, scope)


_int8 = _panel_of(ElementType.INT8)
_bf16 = _panel_of(ElementType.BFLOAT16)
_f32 = _panel_of(ElementType.FLOAT32)


@m.jit
def multiply_panel(
    element_type: int,
    add: bool,
    matrix: Any,
    panel: int,
    following: int,
    rows: int,
    a: int,
    a_scales: int,
    out: int,
    out_row: int,
) -> None:
    """Multiply *rows* rows by one panel and store the results, or add them to the existing values.

    following   the panel that this thread multiplies next; it is prefetched if it exists
    a           address of the activations, words x 4 bytes per row
    a_scales    int8: address of [rows, groups] float32
    out         address of the first result of the panel; rows are out_row bytes apart
    """
    words = matrix.words
    size = words * 128 if element_type else words // GROUP_WORDS * _GROUP_BYTES
    at = matrix.panels + panel * size
    scales = matrix.scales + panel * 128
    scales_row = words // GROUP_WORDS * 4
    bias = matrix.bias + panel * 128
    a_row = words * 4
    adds = np.int64(add)
    ahead = matrix.panels + following * size
    lines = min(size // 64, _MOST_LINES) if following < matrix.count else 0
    if element_type == 0:
        _int8(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row, adds, ahead, lines)
    elif element_type == 1:
        _bf16(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row, adds, ahead, lines)
    else:
        _f32(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row, adds, ahead, lines)
