"""Multiply rows by a matrix that was laid out once, in int8, bfloat16 or float32.

A matrix [out, in] is cut into panels of 32 outputs. In a panel, 4 bytes of each output's inputs lie
together (four int8, two bfloat16 or one float32), so that one instruction takes 16 outputs one such word
further. Up to 12 rows go through a panel together, 24 accumulators in registers; 8 rows in int8, which adds
up twice.

    panels [out / 32, words, 2, 16, 4 bytes]      words = in x bytes of an element / 4

int8 means 8-bit weights with a scale per output, and 8-bit activations with a scale per row and group of 64
inputs, rounded to the nearest: with one scale for a whole row, which outliers dictate, the perplexity of
SmolLM2 is 5.6 % higher than in float32, with groups 0.6 %. Activations are stored as unsigned, 128 higher
than they are, as the instruction wants them; what that adds to a group's sum is known beforehand. Sums
within a group are exact integers; groups are added up in order.

    panels of int8 [out / 32, groups, 64 + 16 x 128 bytes]: 32 int16, the sums of the group's weights, then
    the group's 16 words
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numba import types

from headrace.worker.engine.cpu.kernels import machine as m

PANEL = 2 * m.LANES  # outputs
GROUP = 64  # int8: inputs that share a scale
_GROUP_WORDS = GROUP // 4
_GROUP_BYTES = 64 + 128 * _GROUP_WORDS


class Kind(IntEnum):
    """What weights and activations are multiplied in."""

    INT8 = 0
    BFLOAT16 = 1
    FLOAT32 = 2


ELEMENT_BYTES = {Kind.INT8: 1, Kind.BFLOAT16: 2, Kind.FLOAT32: 4}

# What a matrix is to the kernels; the addresses' owners must outlive it.
MATRIX = np.dtype(
    [
        ("panels", np.int64),  # address, 64-byte aligned
        ("count", np.int64),  # panels
        ("words", np.int64),  # of an output's inputs
        ("scales", np.int64),  # int8: address of [out] float32
        ("bias", np.int64),  # address of [out] float32; zeros where the layer has none
    ]
)


def _tile(kind: Kind, rows: int, *, add: bool) -> Any:
    """Make the kernel that takes *rows* rows through one panel.

    Its arguments: activations and their bytes per row, their scales and the scales' bytes per row, panel,
    words, the panel's scales and bias, results and their bytes per row. Results are stored, or added to
    what is there.
    """

    def emit(
        b: Any, a: Any, a_row: Any, a_scales: Any, scales_row: Any, panel: Any, words: Any, scales: Any,
        bias: Any, out: Any, out_row: Any,
    ) -> None:  # fmt: skip
        starts = [b.add(a, b.mul(a_row, m.integer(r))) for r in range(rows)]
        if kind is Kind.INT8:
            own_scales = [b.add(a_scales, b.mul(scales_row, m.integer(r))) for r in range(rows)]
            sums = _grouped(b, starts, own_scales, panel, b.udiv(words, m.integer(_GROUP_WORDS)))
        else:
            zeros = [m.floats(0.0)] * (2 * rows)
            sums = m.counted_loop(b, words, zeros, _word(b, kind, starts, panel))
        for half in (0, 1):
            here = m.integer(64 * half)
            offsets = m.load(b, b.add(bias, here), m.FLOATS)
            if kind is Kind.INT8:
                factors = m.load(b, b.add(scales, here), m.FLOATS)
            for r in range(rows):
                value = sums[2 * r + half]
                value = m.fma(b, value, factors, offsets) if kind is Kind.INT8 else b.fadd(value, offsets)
                place = b.add(b.add(out, b.mul(out_row, m.integer(r))), here)
                if add:
                    value = b.fadd(value, m.load(b, place, m.FLOATS))
                m.store(b, place, value)

    return m.kernel([types.int64] * 10, emit)


def _word(b: Any, kind: Kind, starts: list[Any], panel: Any) -> Any:
    """Make the body of a loop over words: each row's 4 bytes times those of 32 outputs."""

    def body(word: Any, sums: list[Any]) -> list[Any]:
        at = m.offset(b, panel, word, 128)
        weights = [m.load(b, b.add(at, m.integer(64 * half)), m.INTS, 64) for half in (0, 1)]
        new = []
        for r, start in enumerate(starts):
            own = m.splat(b, m.load(b, m.offset(b, start, word, 4), m.I32))
            new += [_dot(b, kind, sums[2 * r + half], own, weights[half]) for half in (0, 1)]
        return new

    return body


def _grouped(b: Any, starts: list[Any], scales: list[Any], panel: Any, groups: Any) -> list[Any]:
    """Sum up int8 products group by group, each row's group with its own scale."""

    def body(group: Any, totals: list[Any]) -> list[Any]:
        at = m.offset(b, panel, group, _GROUP_BYTES)
        excess = []
        for half in (0, 1):
            weights = m.load(b, b.add(at, m.integer(32 * half)), m.SHORTS, 32)
            excess.append(b.sub(m.ints(0), b.shl(b.sext(weights, m.INTS), m.ints(7))))
        own = [m.offset(b, start, group, GROUP) for start in starts]
        word = _word(b, Kind.INT8, own, b.add(at, m.integer(64)))
        sums = m.counted_loop(b, m.integer(_GROUP_WORDS), excess * len(starts), word)
        new = []
        for r, scale in enumerate(scales):
            factor = m.splat(b, m.load(b, m.offset(b, scale, group, 4), m.F32))
            for half in (0, 1):
                value = b.sitofp(sums[2 * r + half], m.FLOATS)
                new.append(m.fma(b, value, factor, totals[2 * r + half]))
        return new

    return m.counted_loop(b, groups, [m.floats(0.0)] * (2 * len(starts)), body)


def _dot(b: Any, kind: Kind, acc: Any, own: Any, weights: Any) -> Any:
    if kind is Kind.INT8:
        return m.dot_int8(b, acc, own, weights)
    if kind is Kind.BFLOAT16:
        return m.dot_bf16(b, acc, own, weights)
    return m.fma(b, b.bitcast(own, m.FLOATS), b.bitcast(weights, m.FLOATS), acc)


_SIZES = (1, 2, 3, 4, 6, 8, 12)


def _panel_of(kind: Kind, *, add: bool) -> Any:
    """Make the function that takes any number of rows through one panel, in tiles."""
    most = 8 if kind is Kind.INT8 else 12
    t1, t2, t3, t4, t6, t8, t12 = (_tile(kind, min(rows, most), add=add) for rows in _SIZES)

    @m.compiled
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


_int8, _int8_add = _panel_of(Kind.INT8, add=False), _panel_of(Kind.INT8, add=True)
_bf16, _bf16_add = _panel_of(Kind.BFLOAT16, add=False), _panel_of(Kind.BFLOAT16, add=True)
_f32, _f32_add = _panel_of(Kind.FLOAT32, add=False), _panel_of(Kind.FLOAT32, add=True)


@m.compiled
def multiply_panel(
    kind: int, add: bool, matrix: Any, panel: int, rows: int, a: int, a_scales: int, out: int, out_row: int
) -> None:
    """Compute *rows* rows of one panel: out [rows, out_row bytes] from its first column, or += there.

    a         address of the activations, words x 4 bytes a row
    a_scales  int8: address of [rows, groups] float32
    out       address of the panel's first result
    """
    words = matrix.words
    size = words * 128 if kind else words // _GROUP_WORDS * _GROUP_BYTES
    at = matrix.panels + panel * size
    scales = matrix.scales + panel * 128
    scales_row = words // _GROUP_WORDS * 4
    bias = matrix.bias + panel * 128
    a_row = words * 4
    if kind == 0:
        if add:
            _int8_add(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
        else:
            _int8(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
    elif kind == 1:
        if add:
            _bf16_add(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
        else:
            _bf16(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
    elif add:
        _f32_add(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
    else:
        _f32(rows, a, a_row, a_scales, scales_row, at, words, scales, bias, out, out_row)
