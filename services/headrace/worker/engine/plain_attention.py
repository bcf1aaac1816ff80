"""Attention over paged memory in plain torch: correct for every model, device and dtype, but slow.

It is the fallback where the fast kernels do not apply, and the reference for what they compute.
"""

from __future__ import annotations

import torch

from headrace.worker.engine.flat_step import FlatStep, destinations
from headrace.worker.engine.kv_memory import PagedMemory
from headrace.worker.engine.transformers_attention import Masking

BLOCK_TOKENS = 32

# Most products of queries and keys in memory at once, to bound the memory of a long chunk.
_PRODUCTS = 1 << 26


class PlainAttention:
    """Computes attention row by row, in float32."""

    def __init__(self, memory: PagedMemory, flat: FlatStep) -> None:
        self._memory = memory
        self._where = torch.from_numpy(destinations(flat, memory.block_tokens)).to(memory.device)
        self._rows = []
        bounds = zip(flat.offsets[:-1].tolist(), flat.offsets[1:].tolist(), strict=True)
        for (begin, end), start, stop, table in zip(
            bounds, flat.starts.tolist(), flat.stops.tolist(), flat.tables, strict=True
        ):
            blocks = torch.from_numpy(table[: -(-stop // memory.block_tokens)]).to(memory.device)
            self._rows.append((begin, end, start, stop, blocks))

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masking: Masking
    ) -> torch.Tensor:
        """See `StepAttention`."""
        real = len(self._where)
        self._memory.store(layer, self._where, keys[:real], values[:real])
        held_keys, held_values = self._memory[layer]
        out = query.new_zeros(*query.shape[:2], values.shape[2])
        for begin, end, start, stop, blocks in self._rows:
            # Stale contents of the blocks are left out, because they may not be finite.
            seen_keys, seen_values = (held[blocks].flatten(0, 1)[:stop] for held in (held_keys, held_values))
            chunk = max(_PRODUCTS // (query.shape[1] * stop), 1)
            for first in range(begin, end, chunk):
                own = slice(first, min(first + chunk, end))
                at = start + first - begin
                out[own] = attend(query[own], seen_keys, seen_values, at, masking)
        return out


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, masking: Masking
) -> torch.Tensor:
    """Compute attention of consecutive tokens of one sequence.

    query          [tokens, heads, key_dim], at positions first, first + 1, ...
    keys, values   [length, kv_heads, key_dim or value_dim]

    Returns [tokens, heads, value_dim].
    """
    tokens, heads, dim = query.shape
    length, kv_heads = keys.shape[:2]
    shared = query.view(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).float()
    products = shared @ keys.permute(1, 2, 0)[:, None].float() * masking.scale
    if masking.softcap is not None:
        products = torch.tanh(products / masking.softcap) * masking.softcap
    places = torch.arange(length, device=query.device)
    own = torch.arange(first, first + tokens, device=query.device)[:, None]
    hidden = places > own
    if masking.window is not None:
        hidden |= places <= own - masking.window
    weights = torch.softmax(products.masked_fill(hidden, float("-inf")), dim=-1)
    seen = weights @ values.transpose(0, 1)[:, None].float()  # [kv_heads, group, tokens, value_dim]
    return seen.permute(2, 0, 1, 3).reshape(tokens, heads, -1).to(query.dtype)
