"""The first kernels of a step: the ids that only the device knows, and the rows of the embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.norms import normalise, row_options
from headrace.worker.engine.gpu.kernels.variants import Variant
from headrace.worker.engine.gpu.step_inputs import LATEST

_LATEST = tl.constexpr(LATEST)
_RESOLVED = 256  # ids per program


@triton.jit(do_not_specialize=["tokens"])
def _resolve(
    ids: tl.tensor,
    slot_of: tl.tensor,
    latest: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < tokens
    known = tl.load(ids + places, mask=inside, other=0)
    slot = tl.load(slot_of + places, mask=inside, other=0)
    sampled = tl.load(latest + slot, mask=inside & (known == _LATEST), other=0)
    tl.store(out + places, tl.where(known == _LATEST, sampled, known), mask=inside)


def resolve(ids: torch.Tensor, slot_of: torch.Tensor, latest: torch.Tensor) -> torch.Tensor:
    """Return the ids of a step, with the latest token of its slot in place of each LATEST.

    ids, slot_of   [tokens] int32, see `StepInputs`
    latest         [slots] int32, the token that each slot sampled last

    Returns [tokens] int32.
    """
    out = torch.empty_like(ids)
    tokens = len(ids)
    grid = (triton.cdiv(tokens, _RESOLVED),)
    _resolve[grid](ids, slot_of, latest, out, tokens, BLOCK=_RESOLVED, num_warps=4, enable_fp_fusion=True)
    return out


@triton.jit
def _embed(
    ids: tl.tensor,
    table: tl.tensor,
    weights: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    vocabulary: tl.tensor,
    WIDTH: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    # An id that another kernel sampled was not checked by the host. A wrong one must not stop the device.
    index = tl.minimum(tl.maximum(tl.load(ids + token), 0), vocabulary - 1)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.load(table + index.to(tl.int64) * WIDTH + columns, mask=inside, other=0.0)
    tl.store(residual + token * WIDTH + columns, row, mask=inside)
    weight = tl.load(weights + columns, mask=inside, other=0.0)
    normed = normalise(row.to(tl.float32), weight, WIDTH, EPSILON)
    tl.store(out + token * WIDTH + columns, normed, mask=inside)


def embed(
    ids: torch.Tensor,
    table: torch.Tensor,
    weights: torch.Tensor,
    epsilon: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of tokens, and their RMS norms.

    ids       [tokens] int32; those outside the table are treated as the nearest one inside
    table     [vocabulary, hidden], contiguous
    weights   [hidden], of the norm
    epsilon   is added to the mean square
    residual  [tokens, hidden], contiguous, receives the embeddings; a new tensor by default

    Returns two tensors [tokens, hidden].
    """
    tokens, (vocabulary, hidden) = len(ids), table.shape
    if residual is None:
        residual = torch.empty(tokens, hidden, dtype=table.dtype, device=table.device)
    out = torch.empty_like(residual)
    _embed[(tokens,)](
        ids,
        table,
        weights,
        residual,
        out,
        vocabulary,
        WIDTH=hidden,
        EPSILON=epsilon,
        **row_options(hidden),
    )
    return residual, out


def variants() -> list[Variant]:
    """Return how real models use the kernels of this module."""
    integers = dict.fromkeys(("ids", "slot_of", "latest", "out"), "*i32")
    pointers = {"ids": "*i32", "table": "*bf16", "weights": "*bf16", "residual": "*bf16", "out": "*bf16"}
    return [
        Variant(
            name="latest tokens",
            kernel=_resolve,
            signature={**integers, "tokens": "i32"},
            constants={"BLOCK": _RESOLVED},
        ),
        *(
            Variant(
                name=f"embedding, hidden size {width}",
                kernel=_embed,
                signature={**pointers, "vocabulary": "i32"},
                constants={"WIDTH": width, "EPSILON": 1e-6, "BLOCK": row_options(width)["BLOCK"]},
                num_warps=row_options(width)["num_warps"],
            )
            for width in (896, 4096, 8192)
        ),
    ]
