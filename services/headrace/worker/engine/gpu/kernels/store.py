"""Write the keys and values of a step's tokens to paged memory, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.variants import Variant

_NUMBERS = 2048  # about as many keys as a program copies


def store(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    where: torch.Tensor,
) -> None:
    """Write tokens' keys and values.

    keys        [tokens, kv_heads, key_dim]; any strides
    values      [tokens, kv_heads, value_dim]; any strides
    key_pages   [blocks, block_tokens, kv_heads, key_dim], contiguous; value_pages with value_dim
    where       [tokens] int32: block x block_tokens + offset in the block
    """
    _, kv_heads, key_dim = keys.shape
    value_dim = values.shape[2]
    constants = _constants(kv_heads, key_dim, value_dim)
    grid = (len(where), triton.cdiv(kv_heads, constants["HEADS"]))
    _store[grid](
        keys, values, key_pages, value_pages, where, *keys.stride(), *values.stride(),
        **constants, num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


def _constants(kv_heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    key_width, value_width = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    return {
        "KV_HEADS": kv_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_WIDTH": key_width,
        "VALUE_WIDTH": value_width,
        "HEADS": min(triton.next_power_of_2(kv_heads), max(_NUMBERS // max(key_width, value_width), 1)),
    }


@triton.jit
def _store(
    keys: tl.tensor, values: tl.tensor, key_pages: tl.tensor, value_pages: tl.tensor,
    where: tl.tensor,
    key_token: tl.tensor, key_head: tl.tensor, key_dim: tl.tensor, value_token: tl.tensor,
    value_head: tl.tensor, value_dim: tl.tensor,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, HEADS: tl.constexpr,
) -> None:  # fmt: skip
    """Copy some heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(where + token).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, KEY_WIDTH)[None, :]
    exists = (heads < KV_HEADS) & (dims < KEY_DIM)
    copied = tl.load(keys + token * key_token + heads * key_head + dims * key_dim, mask=exists)
    tl.store(key_pages + place * (KV_HEADS * KEY_DIM) + heads * KEY_DIM + dims, copied, mask=exists)
    dims = tl.arange(0, VALUE_WIDTH)[None, :]
    exists = (heads < KV_HEADS) & (dims < VALUE_DIM)
    copied = tl.load(values + token * value_token + heads * value_head + dims * value_dim, mask=exists)
    tl.store(value_pages + place * (KV_HEADS * VALUE_DIM) + heads * VALUE_DIM + dims, copied, mask=exists)


def variants() -> list[Variant]:
    """Return what the kernel is compiled for."""
    strides = ("key_token", "key_head", "value_token", "value_head")
    return [
        Variant(
            name=f"{kv_heads} heads of {key_dim}/{value_dim}",
            kernel=_store,
            signature=dict.fromkeys(("keys", "values", "key_pages", "value_pages"), "*bf16")
            | {"where": "*i32"}
            | dict.fromkeys(strides, "i32"),
            constants={"key_dim": 1, "value_dim": 1} | _constants(kv_heads, key_dim, value_dim),
            num_stages=1,
            fp_fusion=False,
            aligned=frozenset(strides),
        )
        for kv_heads, key_dim, value_dim in ((8, 128, 128), (2, 64, 64), (32, 96, 96), (16, 192, 128))
    ]
