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


def _tile(element_type: ElementType, rows: int, *, add: bool) -> Any:
    """Make the kernel that multiplies *rows* rows by one panel.

    Arguments: activations and their bytes per row; scales of the activations and their bytes per row; panel;
    words; scales and bias of the panel; results and their bytes per row. Results are stored, or added to
    the existing values.
    """

    def emit(
        b: Any, a: Any, a_row: Any, a_scales: Any, scales_row: Any, panel: Any, words: Any, scales: Any,
        bias: Any, out: Any, out_row: Any,
    ) -> None:  # fmt: skip
        starts = [b.add(a, b.mul(a_row, m.integer(r))) for r in range(rows)]
        if element_type is ElementType.INT8:
            own_scales = [b.add(a_scales, b.mul(scales_row, m.integer(r))) for r in range(rows)]
            sums = _grouped(b, starts, own_scales, panel, b.udiv(words, m.integer(GROUP_WORDS)))
        else:
            zeros = [m.floats(0.0)] * (2 * rows)
            sums = m.counted_loop(b, words, zeros, _word(b, element_type, starts, panel))
        for half in (0, 1):
            here = m.integer(64 * half)
            offsets = m.load(b, b.add(bias, here), m.FLOATS)
            if element_type is ElementType.INT8:
                factors = m.load(b, b.add(scales, here), m.FLOATS)
            for r in range(rows):
                value = sums[2 * r + half]
                value = (
                    m.fma(b, value, factors, offsets)
                    if element_type is ElementType.INT8
                    else b.fadd(value, offsets)
                )
                place = b.add(b.add(out, b.mul(out_row, m.integer(r))), here)
                if add:
                    value = b.fadd(value, m.load(b, place, m.FLOATS))
                m.store(b, place, value)

    return m.make_intrinsic([types.int64] * 10, emit)


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


def _grouped(b: Any, starts: list[Any], scales: list[Any], panel: Any, groups: Any) -> list[Any]:
    """Sum int8 products by group, and scale each sum by the factor of its row and group."""

    def body(group: Any, totals: list[Any]) -> list[Any]:
        at = m.offset(b, panel, group, _GROUP_BYTES)
        excess = []
        for half in (0, 1):
            weights = m.load(b, b.add(at, m.integer(32 * half)), m.SHORTS, 32)
            excess.append(b.sub(m.ints(0), b.shl(b.sext(weights, m.INTS), m.ints(7))))
        own = [m.offset(b, start, group, GROUP) for start in starts]
        word = _word(b, ElementType.INT8, own, b.add(at, m.integer(64)))
        sums = m.counted_loop(b, m.integer(GROUP_WORDS), excess * len(starts), word)
        new = []
        for r, scale in enumerate(scales):
            factor = m.splat(b, m.load(b, m.offset(b, scale, group, 4), m.F32))
            for half in (0, 1):
                value = b.sitofp(sums[2 * r + half], m.FLOATS)
                new.append(m.fma(b, value, factor, totals[2 * r + half]))
        return new

    return m.counted_loop(b, groups, [m.floats(0.0)] * (2 * len(starts)), body)


def _dot(b: Any, element_type: ElementType, acc: Any, own: Any, weights: Any) -> Any:
    if element_type is ElementType.INT8:
        return m.dot_int8(b, acc, own, weights)
    if element_type is ElementType.BFLOAT16:
        return m.dot_bf16(b, acc, own, weights)
    return m.fma(b, b.bitcast(own, m.FLOATS), b.bitcast(weights, m.FLOATS), acc)


_TILE_ROWS = (1, 2, 3, 4, 6, 8, 12)


def _panel_of(element_type: ElementType, *, add: bool) -> Any:
    """Make the function that multiplies any number of rows by one panel, in tiles."""
    most = 8 if element_type is ElementType.INT8 else 12
    t1, t2, t3, t4, t6, t8, t12 = (_tile(element_type, min(rows, most), add=add) for rows in _TILE_ROWS)

    @m.jit
    def panel_of(
        rows: int, a: int, a_row: int, a_scales: int, scales_row: int, panel: int, words: int, scales: int,
        bias: int, out: int, out_row: int,
    ) -> None:  # fmt: skip
        r = 0
        while r < rows:
            left = rows - r
            a0, s0, o0 = a + r * a_row, a_scales + r * scales_row, out + r * out_row
            if left >= 12 and most == 12:
                t12(a0, a_row, s0, scales_row, panel, words, scales, bias, o0, out_row)
                r += 12
            elif left >= 8:
                t8(a0, a_row, s0, scales_row, panel, words, scales, bias, o0, out_row)
                r += 8
            elif left >= 6:
                t6(a0, a_row, s0, scales_row, panel, words, scales, bias, o0, out_row)
                r += 6
            elif left >= 4:
                t4(a0, a_row, s0, scales_row, panel, words, scales, bias, o0, out_row)
                r += 4
            elif left == 3:
                t3(a0, a_row, s0, scales_row, panel, words, scales, bias, o0, out_row)
                r += 3
            elif left == 2:
                t2(a0, a_row, s0, scales_row, panel, words, scales, bias, o0, out_row)
                r += 2
            else:
                t1(a0, a_row, s0, scales_row, panel, words, scales, bias, o0, out_row)
                r += 1

    return panel_of


_int8, _int8_add = _panel_of(ElementType.INT8, add=False), _panel_of(ElementType.INT8, add=True)
_bf16, _bf16_add = _panel_of(ElementType.BFLOAT16, add=False), _panel_of(ElementType.BFLOAT16, add=True)
_f32, _f32_add = _panel_of(ElementType.FLOAT32, add=False), _panel_of(ElementType.FLOAT32, add=True)


@m.jit
def multiply_panel(
    element_type: int,
    add: bool,
    matrix: Any,
    panel: int,
    rows: int,
    a: int,
    a_scales: int,
    out: int,
    out_row: int,
) -> None:
    """Multiply *rows* rows by one panel and store the results, or add them to the existing values.

    a         address of the activations, words x 4 bytes per row
    a_scales  int8: address of [rows, groups] float32
    out       address of the first result of the panel; rows are out_row bytes apart
    """
    words = matrix.words
    size = words * 128 if element_type else words // GROUP_WORDS * _GROUP_BYTES
    at = matrix.panels + panel * size
    scales = matrix.scales + panel * 128
    scales_row = words // GROUP_WORDS * 4
    bias = matrix.bias + panel * 128
    a_row = words * 4
    if element_type == 0:
        if add:
            _int8_add(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
        else:
            _int8(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
    elif element_type == 1:
        if add:
            _bf16_add(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
        else:
            _bf16(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
    elif add:
        _f32_add(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
    else:
        _f32(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
