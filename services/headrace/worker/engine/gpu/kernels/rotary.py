"""One kernel between the projection to queries, keys and values, and attention.

It normalises queries and keys where the model does (Qwen3), rotates them (Su et al., RoFormer, 2021), writes
the queries back, and the keys and values to their places in paged memory. Angles and products are float32;
the results are rounded once to the dtype of the model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.variants import Variant


@triton.jit
def _normalise_halves(
    first: tl.tensor,
    second: tl.tensor,
    weights: tl.tensor,
    half: tl.tensor,
    HALF: tl.constexpr,
    EPSILON: tl.constexpr,
) -> tl.tensor:
    """Return the RMS norms of heads whose halves are in two arrays [heads, half], float32."""
    first_weight = tl.load(weights + half, mask=half < HALF, other=0.0)
    second_weight = tl.load(weights + HALF + half, mask=half < HALF, other=0.0)
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = tl.rsqrt(squares / (2 * HALF) + EPSILON)[:, None]
    dtype: tl.constexpr = first_weight.dtype
    first = (first * scale).to(dtype).to(tl.float32) * first_weight.to(tl.float32)[None, :]
    second = (second * scale).to(dtype).to(tl.float32) * second_weight.to(tl.float32)[None, :]
    return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)


@triton.jit
def _rotate_and_store(
    qkv: tl.tensor,
    positions: tl.tensor,
    where: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    key_pages: tl.tensor,
    value_pages: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    EPSILON: tl.constexpr,
    NORM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    dim: tl.constexpr = 2 * HALF
    half = tl.arange(0, HALF_BLOCK)
    in_half = half < HALF
    angles = tl.load(positions + token).to(tl.int64) * HALF + half
    cosine = tl.load(cosines + angles, mask=in_half, other=0.0)
    sine = tl.load(sines + angles, mask=in_half, other=0.0)
    row = qkv + token * (KV_HEADS * (GROUP + 2) * dim)

    member = tl.arange(0, GROUP_BLOCK)
    inside = (member[:, None] < GROUP) & in_half[None, :]
    queries = row + (kv_head * GROUP + member[:, None]) * dim + half[None, :]
    first = tl.load(queries, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(queries + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        first, second = _normalise_halves(first, second, query_norm, half, HALF, EPSILON)
    tl.store(queries, first * cosine[None, :] - second * sine[None, :], mask=inside)
    tl.store(queries + HALF, second * cosine[None, :] + first * sine[None, :], mask=inside)

    place = (tl.load(where + token).to(tl.int64) * KV_HEADS + kv_head) * dim
    single = in_half[None, :]
    keys = row + (KV_HEADS * GROUP + kv_head) * dim + half[None, :]
    first = tl.load(keys, mask=single, other=0.0).to(tl.float32)
    second = tl.load(keys + HALF, mask=single, other=0.0).to(tl.float32)
    if NORM:
        first, second = _normalise_halves(first, second, key_norm, half, HALF, EPSILON)
    written = key_pages + place + half[None, :]
    tl.store(written, first * cosine[None, :] - second * sine[None, :], mask=single)
    tl.store(written + HALF, second * cosine[None, :] + first * sine[None, :], mask=single)

    values = row + (KV_HEADS * (GROUP + 1) + kv_head) * dim + half
    written = value_pages + place + half
    tl.store(written, tl.load(values, mask=in_half, other=0.0), mask=in_half)
    tl.store(written + HALF, tl.load(values + HALF, mask=in_half, other=0.0), mask=in_half)


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    where: torch.Tensor,
    *,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    epsilon: float,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
) -> None:
    """Rotate queries and keys, and store keys and values.

    qkv             [tokens, (heads + 2 x kv_heads) x dim], contiguous: queries, keys and values of each
                    token. The queries become the rotated ones; keys and values stay as they are
    positions       [tokens] int32; each is a row of the tables of angles
    where           [tokens] int32, see `StepInputs`
    cosines, sines  [positions, dim / 2] float32, contiguous
    norms           weights [dim] of the norms of queries and of keys; None for models without
    epsilon         of these norms
    key_pages       [blocks, block_tokens, kv_heads, dim], contiguous; value_pages alike
    """
    kv_heads, dim = key_pages.shape[2:]
    group = qkv.shape[1] // dim // kv_heads - 2
    query_norm, key_norm = norms or (qkv, qkv)  # not read
    _rotate_and_store[(len(positions), kv_heads)](
        qkv,
        positions,
        where,
        cosines,
        sines,
        query_norm,
        key_norm,
        key_pages,
        value_pages,
        KV_HEADS=kv_heads,
        NORM=norms is not None,
        EPSILON=epsilon,
        **_head_constants(group, dim),
        num_warps=_warps(group, dim),
        enable_fp_fusion=True,
    )


def _head_constants(group: int, dim: int) -> dict[str, int]:
    return {
        "GROUP": group,
        "HALF": dim // 2,
        "GROUP_BLOCK": triton.next_power_of_2(group),
        "HALF_BLOCK": triton.next_power_of_2(dim // 2),
    }


def _warps(group: int, dim: int) -> int:
    """Return the warps of a program: one per 512 numbers of the queries."""
    numbers: int = triton.next_power_of_2(group) * triton.next_power_of_2(dim)
    return min(max(numbers // 512, 1), 8)


def variants() -> list[Variant]:
    """Return how real models use the kernels of this module."""
    halves = ("qkv", "query_norm", "key_norm", "key_pages", "value_pages")
    signature = {"positions": "*i32", "where": "*i32", "cosines": "*fp32", "sines": "*fp32"}
    return [
        Variant(
            name=name,
            kernel=_rotate_and_store,
            signature={**signature, **dict.fromkeys(halves, "*bf16")},
            constants={
                "KV_HEADS": kv_heads,
                "NORM": norm,
                "EPSILON": 1e-6,
                **_head_constants(group, dim),
            },
            num_warps=_warps(group, dim),
        )
        for name, kv_heads, group, dim, norm in (
            ("Qwen2.5-0.5B", 2, 7, 64, False),
            ("Qwen3-0.6B", 8, 2, 128, True),
            ("Llama-3-8B", 8, 4, 128, False),
        )
    ]
