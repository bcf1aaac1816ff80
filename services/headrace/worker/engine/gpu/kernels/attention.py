"""Attention of ragged queries over paged keys and values: causal, grouped, with window and soft cap.

A program computes one query tile of one key head: the tokens of the tile times the query heads that share the
key head. It reads keys in tiles, through the block table of the tile's row, and keeps a running softmax
(Milakov and Gimelshein, Online normalizer calculation for softmax, 2018).

With `segmented`, the keys of a row are divided into segments of SEGMENT keys from position 0. Each segment
has a softmax of its own, and segments are merged in ascending order. A program computes all segments of its
tile, or several programs share them and a second kernel merges (Dao et al., Flash-Decoding for long-context
inference, 2023). As the segments do not depend on the step and both kernels merge by the same arithmetic, a
token has the same bits in both, in any batch, and in any query tile of the same number of lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from headrace.worker.engine.gpu.kernels.attention_kernels import attend_tile, merge_segments
from headrace.worker.engine.gpu.kernels.tiling import (
    SEGMENT,
    Tiling,
    padded_dim,
    power_of_2,
    tile_for,
    tiling,
)
from headrace.worker.engine.gpu.kernels.variants import Variant
from headrace.worker.engine.gpu.step_inputs import StepInputs
from headrace.worker.engine.transformers_attention import Masking

MERGED_AT_ONCE = 16  # most segments that the merging kernel loads together


@dataclass(frozen=True, slots=True)
class Partials:
    """Memory for the softmaxes of single segments, if several programs share the segments of a tile.

    memory     float32, at least `partial_numbers` of them
    segments   most segments of a row
    programs   number of programs that share the segments of a tile
    """

    memory: torch.Tensor
    segments: int
    programs: int


def partial_numbers(rows: int, heads: int, value_dim: int, segments: int) -> int:
    """Return how many float32 the softmaxes of all segments of *rows* decodes have."""
    return rows * heads * segments * (value_dim + 2)


def attend(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    tables: torch.Tensor,
    step: StepInputs,
    masking: Masking,
    out: torch.Tensor,
    *,
    segmented: bool,
    partials: Partials | None = None,
    capability: int = 0,
) -> None:
    """Compute attention of all tokens of a step whose keys and values are stored.

    query         [tokens, heads, key_dim]; any strides
    key_pages     [blocks, block_tokens, kv_heads, key_dim], contiguous; value_pages with value_dim
    tables        [slots, width] int32: the blocks of each slot, contiguous
    out           [tokens, heads, value_dim], written; any strides. Padding tokens are left as they are
    segmented     whether the softmax is computed in segments
    partials      if given, several programs share the segments of a tile; only for segmented steps of decodes
    capability    compute capability of the device, see `tiling`

    Memory beyond a row's keys is not read. Nothing depends on the other rows of the step.
    """
    heads, key_dim = query.shape[1:]
    block_tokens, kv_heads, value_dim = value_pages.shape[1:]
    tile, tiles = step.shape.tile, len(step.tile_rows)
    assert partials is None or (segmented and tile == 1)
    shape = tiling(tile, heads // kv_heads, key_dim, value_dim, query.itemsize, capability)
    constants = _constants(shape, tile, heads, kv_heads, key_dim, value_dim, masking, block_tokens)
    attend_tile[(tiles * kv_heads, partials.programs if partials else 1)](
        query, key_pages, value_pages, tables,
        step.slots, step.offsets, step.starts, step.tile_rows, step.tile_offsets,
        out, partials.memory if partials else out,
        *query.stride(), *out.stride(), tables.stride(0), partials.segments if partials else 0,
        **constants, SEGMENTED=segmented, SPLIT=partials is not None,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
        # The same multiplications and additions must round the same way in every segmented variant.
        enable_fp_fusion=not segmented,
    )  # fmt: skip
    if partials is not None:
        merge_segments[(tiles, heads)](
            partials.memory, step.starts, step.offsets, step.tile_rows, step.tile_offsets,
            out, *out.stride(), partials.segments,
            **_merging_constants(value_dim, masking, partials.segments),
            num_warps=1, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


def _constants(
    shape: Tiling,
    tile: int,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    masking: Masking,
    block_tokens: int,
) -> dict[str, Any]:
    return {
        "SCALE": masking.scale,
        "SOFTCAP": masking.softcap or 0.0,
        "WINDOW": masking.window or 0,
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_WIDTH": padded_dim(key_dim),
        "VALUE_WIDTH": padded_dim(value_dim),
        "BLOCK_TOKENS": block_tokens,
        "TILE": tile,
        "LINES": shape.lines,
        "KEY_TILE": shape.key_tile,
        "SEGMENT_KEYS": SEGMENT,
    }


def _merging_constants(value_dim: int, masking: Masking, segments: int) -> dict[str, Any]:
    return {
        "WINDOW": masking.window or 0,
        "VALUE_DIM": value_dim,
        "VALUE_WIDTH": padded_dim(value_dim),
        "SEGMENT_KEYS": SEGMENT,
        "AT_ONCE": min(power_of_2(segments), MERGED_AT_ONCE),
    }


# Models whose variants the report compiles: query heads, key heads, their dimensions, masking.
_MODELS = {
    "Llama 3 8B": (32, 8, 128, 128, Masking(128**-0.5)),
    "Qwen2.5 0.5B": (14, 2, 64, 64, Masking(64**-0.5)),
    "Mistral 7B": (32, 8, 128, 128, Masking(128**-0.5, window=4096)),
    "Phi 3 mini": (32, 32, 96, 96, Masking(96**-0.5, window=2047)),
    "Gemma 2 9B": (16, 8, 256, 256, Masking(256**-0.5, softcap=50.0, window=4096)),
    "StarCoder": (48, 1, 128, 128, Masking(128**-0.5)),
    "heads of 512": (8, 2, 512, 512, Masking(512**-0.5)),
    "heads of 192/128": (16, 16, 192, 128, Masking(192**-0.5)),
}


def _spills_allowed(itemsize: int, widest: int, group: int) -> str:
    """Return why a program may spill registers. Compilers differ in some bytes: Triton 3.7 from 3.9."""
    if itemsize == 4:
        return "float32 has no tensor cores: all operands are in registers"
    if group > 32:
        return "12 bytes with Triton 3.6 on 8.x: more than 32 query heads share a key head, which is rare"
    return "heads of more than 256 numbers are rare" if widest > 256 else ""


def variants() -> list[Variant]:
    """Return what the kernels are compiled for: decodes and mixed steps of common models, fast and exact."""
    found = []
    for model, (heads, kv_heads, key_dim, value_dim, masking) in _MODELS.items():
        for kind, exact, itemsize in (
            ("decode", True, 2),
            ("split decode", True, 2),
            ("exact mixed", True, 2),
            ("fast mixed", False, 2),
            ("float32 decode", True, 4),
            ("float32 fast mixed", False, 4),
        ):
            tile = 1
            if "mixed" in kind:
                tile = tile_for(heads // kv_heads, key_dim, value_dim, itemsize, exact=exact)
            shapes: dict[Tiling, list[int]] = {}
            for capability in (80, 86, 90):
                shape = tiling(tile, heads // kv_heads, key_dim, value_dim, itemsize, capability)
                shapes.setdefault(shape, []).append(capability)
            for shape, capabilities in shapes.items():
                constants = _constants(shape, tile, heads, kv_heads, key_dim, value_dim, masking, 32)
                flags = {"SEGMENTED": exact, "SPLIT": kind.startswith("split")}
                found.append(
                    Variant(
                        name=f"{kind}, {model}",
                        kernel=attend_tile,
                        signature=_signature("*bf16" if itemsize == 2 else "*fp32"),
                        constants={"query_dim": 1, "out_dim": 1, **constants, **flags},
                        num_warps=shape.num_warps,
                        num_stages=shape.num_stages,
                        fp_fusion=not exact,
                        aligned=frozenset(("query_token", "query_head", "out_token", "out_head")),
                        targets=tuple(capabilities),
                        spills_allowed=_spills_allowed(itemsize, max(key_dim, value_dim), heads // kv_heads),
                    )
                )
        found.append(
            Variant(
                name=f"merged segments, {model}",
                kernel=merge_segments,
                signature={name: kind for name, kind in _signature("*bf16").items() if name in _MERGED},
                constants={"out_dim": 1, **_merging_constants(value_dim, masking, 512)},
                num_warps=1,
                num_stages=1,
                fp_fusion=False,
                aligned=frozenset(("out_token", "out_head")),
            )
        )
    return found


_MERGED = (
    "partials", "starts", "offsets", "tile_rows", "tile_offsets", "out", "out_token", "out_head", "segments"
)  # fmt: skip


def _signature(numbers: str) -> dict[str, str]:
    """Return the types of run-time arguments, for inputs and outputs of a type."""
    indices = ("tables", "slots", "offsets", "starts", "tile_rows", "tile_offsets")
    sizes = ("query_token", "query_head", "out_token", "out_head", "table_width", "segments")
    return (
        dict.fromkeys(("query", "key_pages", "value_pages", "out"), numbers)
        | dict.fromkeys(indices, "*i32")
        | {"partials": "*fp32"}
        | dict.fromkeys(sizes, "i32")
    )
