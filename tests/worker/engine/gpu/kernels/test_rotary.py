"""The kernel before attention compared with the rotation and the norms of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from headrace.worker.engine.gpu.kernels.rotary import rotate_and_store
from tests.worker.engine.gpu.device import DEVICE, DTYPES
from tests.worker.engine.gpu.kernels.numbers import close

EPSILON = 1e-6
BLOCK_TOKENS = 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 24), (7, 1, 80)])
@torch.inference_mode()
def test_queries_and_keys_are_rotated_and_keys_and_values_stored(
    heads: int, kv_heads: int, dim: int, normed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tokens = 5
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    angles = torch.randn(40, dim // 2)
    positions = torch.tensor([0, 39, 7, 8, 1], dtype=torch.int32)
    where = torch.tensor([3, 17, 8, 0, 23], dtype=torch.int32)
    pages = [torch.full((6, BLOCK_TOKENS, kv_heads, dim), 9.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    norms = [Qwen3RMSNorm(dim, eps=EPSILON).to(dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.data = torch.randn(dim).to(dtype)
    query, keys, values = (part.clone() for part in _split(qkv, heads, kv_heads, dim))
    given = qkv.to(DEVICE, copy=True)

    rotate_and_store(
        given,
        positions.to(DEVICE),
        where.to(DEVICE),
        cosines=angles.cos().to(DEVICE),
        sines=angles.sin().to(DEVICE),
        norms=(norms[0].weight.to(DEVICE), norms[1].weight.to(DEVICE)) if normed else None,
        epsilon=EPSILON,
        key_pages=pages[0],
        value_pages=pages[1],
    )

    if normed:
        query, keys = norms[0](query), norms[1](keys)
    whole = torch.cat([angles, angles], dim=1)[positions.long()]
    query, keys = apply_rotary_pos_emb(query.float(), keys.float(), whole.cos(), whole.sin())
    seen, *unchanged = _split(given.cpu(), heads, kv_heads, dim)
    assert close(seen, query.to(dtype))
    for part, before in zip(unchanged, _split(qkv, heads, kv_heads, dim)[1:], strict=True):
        assert torch.equal(part, before)
    stored_keys, stored_values = (memory.cpu().view(-1, kv_heads, dim) for memory in pages)
    assert close(stored_keys[where.long()], keys.to(dtype))
    assert torch.equal(stored_values[where.long()], values)
    others = torch.ones(len(stored_keys), dtype=torch.bool)
    others[where.long()] = False
    assert bool((stored_keys[others] == 9).all())
    assert bool((stored_values[others] == 9).all())


def _split(qkv: torch.Tensor, heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    """Return queries, keys and values [tokens, heads, dim], as views."""
    parts = torch.split(qkv, [heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    return [part.view(len(qkv), -1, dim) for part in parts]
