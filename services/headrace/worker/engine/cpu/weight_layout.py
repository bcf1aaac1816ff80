"""Lay out the weights of a linear layer for the kernels of `kernels.matmul`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.cpu.kernels.matmul import (
    ELEMENT_BYTES,
    GROUP,
    GROUP_WORDS,
    MATRIX,
    PANEL,
    ElementType,
)

_SUM_WORDS = PANEL // 2  # words of the sums of a group, before its weights
_CHUNK_WEIGHTS = 1 << 18  # converted together


def lay_out(
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    element_type: ElementType,
    owned: list[torch.Tensor],
) -> npt.NDArray[Any]:
    """Lay out a matrix for `kernels.matmul`, and return its MATRIX record.

    weights   one or more matrices [out, in], stacked; in is a multiple of 4, of 64 for int8
    bias      [out] float32
    owned     receives the owners of the addresses in the record
    """
    outputs, inputs = sum(map(len, weights)), weights[0].shape[1]
    rows = -(-outputs // PANEL) * PANEL
    words = inputs * ELEMENT_BYTES[element_type] // 4
    offsets, scales = torch.zeros(rows), torch.zeros(rows)
    if bias is not None:
        offsets[:outputs] = bias
    int8 = element_type is ElementType.INT8
    shape = (inputs // GROUP, _SUM_WORDS + GROUP_WORDS * PANEL) if int8 else (words, PANEL)
    panels = torch.empty(rows // PANEL, *shape, dtype=torch.int32)
    # In chunks, through buffers that stay in the cache of the CPU: converting the whole matrix at once takes
    # three times as long, mostly in the system, which zeroes new memory.
    chunk = min(max(_CHUNK_WEIGHTS // inputs // PANEL, 1) * PANEL, rows)
    quantise = _Quantiser(chunk, inputs) if int8 else None
    dtype = torch.bfloat16 if element_type is ElementType.BFLOAT16 else torch.float32
    for begin in range(0, rows, chunk):
        part = _stacked_rows(weights, begin, min(begin + chunk, rows))
        here = panels[begin // PANEL : (begin + len(part)) // PANEL]
        if quantise is not None:
            quantise(part, scales[begin : begin + len(part)], here)
        else:
            stored = part.to(dtype).view(torch.int32).view(-1, PANEL, words)
            here.copy_(stored.transpose(1, 2))
    record: npt.NDArray[Any] = np.zeros(1, MATRIX)
    record["bias"], record["panels"] = offsets.data_ptr(), panels.data_ptr()
    record["count"], record["words"] = rows // PANEL, words
    owned += [offsets, panels]
    if int8:
        record["scales"] = scales.data_ptr()
        owned.append(scales)
    return record


def _stacked_rows(matrices: Sequence[torch.Tensor], begin: int, end: int) -> torch.Tensor:
    """Return rows *begin* to *end* of stacked matrices in float32, with rows of zeros after the last."""
    parts, first = [], 0
    for matrix in matrices:
        part = matrix[max(begin - first, 0) : max(end - first, 0)]
        if len(part):
            parts.append(part.float())
        first += len(matrix)
    if missing := end - begin - sum(map(len, parts)):
        parts.append(torch.zeros(missing, matrices[0].shape[1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Quantiser:
    """Quantises up to *rows* rows of *inputs* weights at a time to int8."""

    def __init__(self, rows: int, inputs: int) -> None:
        self._floats = torch.empty(rows, inputs)
        self._bytes = torch.empty(rows, inputs, dtype=torch.int8)

    def __call__(self, weights: torch.Tensor, scales: torch.Tensor, panels: torch.Tensor) -> None:
        """Write the scales and panels of some rows.

        weights   [out, in] float32, a multiple of PANEL rows
        scales    [out] float32
        panels    [out / PANEL, in / GROUP, words] int32
        """
        floats, stored = self._floats[: len(weights)], self._bytes[: len(weights)]
        groups = weights.shape[1] // GROUP
        scales.copy_(torch.abs(weights, out=floats).amax(dim=1).clamp_(min=1e-30) / 127)
        torch.div(weights, scales[:, None], out=floats).round_()
        # Sums of integers far below 2^24: exact in float32.
        sums = floats.view(-1, PANEL, groups, GROUP).sum(dim=3).transpose(1, 2)
        panels.view(torch.int16)[..., :PANEL] = sums
        stored.copy_(floats)
        words = stored.view(torch.int32).view(-1, PANEL, groups, GROUP_WORDS).permute(0, 2, 3, 1)
        panels[..., _SUM_WORDS:].view(-1, groups, GROUP_WORDS, PANEL).copy_(words)
