"""Attention on the CPU: Headrace's kernels over paged memory, for any network of transformers."""

from __future__ import annotations

import torch

from headrace.worker.engine.cpu.kernels import paging
from headrace.worker.engine.cpu.kernels.attend import tile_tokens
from headrace.worker.engine.cpu.kernels.kv_layout import BLOCK
from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.transformers_attention import Masking

BLOCK_TOKENS = BLOCK
DTYPES = (torch.float32, torch.bfloat16)  # supported dtypes of KV memory


class KernelAttention:
    """Implements `StepAttention`; batch-invariant: bit-identical alone, in a batch and in a chunk."""

    def __init__(self, memory: paging.KernelMemory, flat: FlatStep) -> None:
        self._memory, self._flat = memory, flat
        self._ragged: dict[int, paging.Ragged] = {}  # by the tokens of a tile
        self._threads = torch.get_num_threads()

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masking: Masking
    ) -> torch.Tensor:
        """See `StepAttention`."""
        tokens, heads, value_dim = self._flat.tokens, query.shape[1], values.shape[2]
        size = tile_tokens(heads, keys.shape[1])
        if size not in self._ragged:
            self._ragged[size] = paging.Ragged(self._flat, size)
        record = self._memory.configure_layer(
            layer,
            heads=heads,
            kv_heads=keys.shape[1],
            head_dim=query.shape[2],
            value_dim=value_dim,
            scale=masking.scale,
            softcap=masking.softcap or 0.0,
            window=masking.window or 0,
        )
        # The kernels take float32, whatever the dtype of the memory is.
        inputs = [tensor[:tokens].float().contiguous() for tensor in (query, keys, values)]
        attended = torch.empty(tokens, heads, int(record["value_dim"][0]))
        addresses = [tensor.data_ptr() for tensor in inputs]
        paging.store_and_attend(
            record,
            self._ragged[size],
            *addresses,
            value_dim=value_dim,
            out=attended.data_ptr(),
            threads=self._threads,
        )
        out = query.new_zeros(query.shape[0], heads, value_dim)
        out[:tokens] = attended[..., :value_dim]
        return out
