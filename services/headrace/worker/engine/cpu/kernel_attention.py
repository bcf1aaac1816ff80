"""Attention on the CPU: our own kernels over paged memory, for any network of transformers."""

from __future__ import annotations

from typing import Any

import torch

from headrace.worker.engine.cpu.kernels import paging
from headrace.worker.engine.cpu.kernels.attend import BLOCK
from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.transformers_attention import Masking

BLOCK_TOKENS = BLOCK
DTYPES = (torch.float32, torch.bfloat16)  # what memory can hold


class KernelAttention:
    """See `StepAttention`. A token's result has the same bits alone, in a batch and in a chunk."""

    def __init__(self, memory: paging.PagedMemory, flat: FlatStep) -> None:
        self._memory = memory
        rows: list[Any] = [flat.starts, flat.stops - flat.starts, flat.tables]
        self._ragged = paging.Ragged(*rows)
        self._threads = torch.get_num_threads()

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masking: Masking
    ) -> torch.Tensor:
        """See `StepAttention`."""
        tokens, heads, value_dim = self._ragged.tokens, query.shape[1], values.shape[2]
        record = self._memory.layer(
            layer,
            heads=heads,
            kv_heads=keys.shape[1],
            head_dim=query.shape[2],
            value_dim=value_dim,
            scale=masking.scale,
            softcap=masking.softcap or 0.0,
            window=masking.window or 0,
        )
        # The kernels compute in float32, whatever the memory holds.
        own = [tensor[:tokens].float().contiguous() for tensor in (query, keys, values)]
        seen = torch.empty(tokens, heads, int(record["value_dim"][0]))
        addresses = [tensor.data_ptr() for tensor in own]
        paging.attend(
            record,
            self._ragged,
            *addresses,
            value_dim=value_dim,
            out=seen.data_ptr(),
            threads=self._threads,
        )
        out = query.new_zeros(query.shape[0], heads, value_dim)
        out[:tokens] = seen[..., :value_dim]
        return out
