"""Write the new blocks of a step's rows into the block tables."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 256  # rows per program


def append_blocks(tables: torch.Tensor, places: torch.Tensor, blocks: torch.Tensor) -> None:
    """Set entries of the flat tables.

    tables   int32, contiguous
    places   [rows] int32 indices; equal ones have equal blocks
    blocks   [rows] int32
    """
    rows = places.numel()
    _append[(triton.cdiv(rows, _BLOCK),)](tables, places, blocks, rows, BLOCK=_BLOCK, enable_fp_fusion=True)


@triton.jit
def _append(tables: Any, places: Any, blocks: Any, rows: Any, BLOCK: tl.constexpr) -> None:
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = own < rows
    place = tl.load(places + own, mask=inside, other=0)
    block = tl.load(blocks + own, mask=inside, other=0)
    tl.store(tables + place, block, mask=inside)
