"""Write the new blocks of a step's rows into the block tables."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.variants import Variant

_BLOCK = 256  # rows per program


@triton.jit(do_not_specialize=["rows"])
def _append(
    tables: tl.tensor, places: tl.tensor, blocks: tl.tensor, rows: tl.tensor, BLOCK: tl.constexpr
) -> None:
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = own < rows
    place = tl.load(places + own, mask=inside, other=0)
    block = tl.load(blocks + own, mask=inside, other=0)
    tl.store(tables + place, block, mask=inside)


def append_blocks(tables: torch.Tensor, places: torch.Tensor, blocks: torch.Tensor) -> None:
    """Set entries of the flat tables.

    tables   int32, contiguous
    places   [rows] int32 indices; equal ones have equal blocks
    blocks   [rows] int32
    """
    rows = len(places)
    grid = (triton.cdiv(rows, _BLOCK),)
    _append[grid](tables, places, blocks, rows, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True)


def variants() -> list[Variant]:
    """Return what the kernel is compiled for."""
    return [
        Variant(
            name="new blocks",
            kernel=_append,
            signature={**dict.fromkeys(("tables", "places", "blocks"), "*i32"), "rows": "i32"},
            constants={"BLOCK": _BLOCK},
        )
    ]
