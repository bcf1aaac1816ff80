"""RMS norms, with the addition to the residual stream that precedes them (Zhang & Sennrich, 2019).

Each row has a program of its own, which holds the row in registers: the sum of squares of a row is computed
in the same order whatever the number of rows. Numbers are rounded where transformers rounds them: the
residual and the normalised row to the model's dtype, before the product with the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.variants import Variant


@triton.jit
def normalise(row: tl.tensor, weights: tl.tensor, WIDTH: tl.constexpr, EPSILON: tl.constexpr) -> tl.tensor:
    """Return a row over its root mean square, times weights (inside kernels).

    row       [block] float32, zero after the first WIDTH numbers
    weights   [block] in the dtype of the model

    Returns [block] in the dtype of the weights.
    """
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / WIDTH + EPSILON)
    rounded = (row * scale).to(weights.dtype).to(tl.float32)
    return (rounded * weights.to(tl.float32)).to(weights.dtype)


@triton.jit
def _add_norm(
    added: tl.tensor,
    residual: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    kept: tl.tensor,
    WIDTH: tl.constexpr,
    EPSILON: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    source = row
    if GATHER:
        source = tl.load(kept + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    places = source.to(tl.int64) * WIDTH + columns
    old = tl.load(residual + places, mask=inside, other=0.0)
    new = tl.load(added + places, mask=inside, other=0.0)
    total = (old.to(tl.float32) + new.to(tl.float32)).to(old.dtype)
    if not GATHER:
        tl.store(residual + places, total, mask=inside)
    weight = tl.load(weights + columns, mask=inside, other=0.0)
    normed = normalise(total.to(tl.float32), weight, WIDTH, EPSILON)
    tl.store(out + row.to(tl.int64) * WIDTH + columns, normed, mask=inside)


def add_norm(
    added: torch.Tensor, residual: torch.Tensor, weights: torch.Tensor, epsilon: float, out: torch.Tensor
) -> None:
    """Add to the residual stream, and normalise it.

    added      [tokens, hidden], the result of attention or of the feed-forward network
    residual   [tokens, hidden]; becomes the sum
    weights    [hidden]
    epsilon    is added to the mean square
    out        [tokens, hidden]; becomes the normalised sum

    All tensors are contiguous and of one dtype.
    """
    tokens, hidden = residual.shape
    _add_norm[(tokens,)](
        added,
        residual,
        weights,
        out,
        added,
        WIDTH=hidden,
        EPSILON=epsilon,
        GATHER=False,
        **row_options(hidden),
    )


def add_norm_of(
    kept: torch.Tensor, added: torch.Tensor, residual: torch.Tensor, weights: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Return the normalised sums of some rows, without changing the residual stream.

    kept   [rows] int32, the rows to compute; other arguments as for `add_norm`

    Returns [rows, hidden].
    """
    rows, hidden = len(kept), residual.shape[1]
    out = torch.empty(rows, hidden, dtype=residual.dtype, device=residual.device)
    _add_norm[(rows,)](
        added,
        residual,
        weights,
        out,
        kept,
        WIDTH=hidden,
        EPSILON=epsilon,
        GATHER=True,
        **row_options(hidden),
    )
    return out


def row_options(width: int) -> dict[str, Any]:
    """Return how to launch a kernel that holds a row of this width in the registers of a program."""
    block = triton.next_power_of_2(width)
    # At most 16 numbers per thread of each of the three or four arrays.
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16), "enable_fp_fusion": True}


def variants() -> list[Variant]:
    """Return how real models use the kernels of this module."""
    pointers = {"added": "*bf16", "residual": "*bf16", "weights": "*bf16", "out": "*bf16", "kept": "*i32"}
    return [
        Variant(
            name=f"{'last rows' if gather else 'add and norm'}, hidden size {width}",
            kernel=_add_norm,
            signature=pointers,
            constants={
                "WIDTH": width,
                "EPSILON": 1e-6,
                "GATHER": gather,
                "BLOCK": row_options(width)["BLOCK"],
            },
            num_warps=row_options(width)["num_warps"],
        )
        for width in (896, 4096, 8192)
        for gather in (False, True)
    ]
