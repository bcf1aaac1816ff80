"""Attention on CUDA: one call of a variable-length kernel per layer, for all rows of a step.

The kernel is torch's FlashAttention over paged memory, in `cuda.attend_varlen`. This module computes its
index arguments for a step as plain arrays, and copies them to the device in one transfer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.flat_step import FlatStep, destinations
from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.kv_memory import PagedMemory
from headrace.worker.engine.transformers_attention import Masking

# FlashAttention 2, which torch includes, supports only blocks of a multiple of 256 tokens.
BLOCK_TOKENS = 256


@dataclasses.dataclass(frozen=True, slots=True)
class VarlenIndex:
    """The index arguments of the kernel for a step: numpy arrays on the host or tensors on the device.

    ids           [tokens]
    positions     [tokens]
    where         [tokens] slots of keys and values, see `flat_step.destinations`
    offsets       [rows + 1] start of the tokens of each row
    key_counts    [rows] number of keys of each row
    key_offsets   [rows + 1] running sum of `key_counts`
    tables        [rows, width]
    """

    ids: Any
    positions: Any
    where: Any
    offsets: Any
    key_counts: Any
    key_offsets: Any
    tables: Any

    @classmethod
    def of(cls, flat: FlatStep, block_tokens: int) -> VarlenIndex:
        """Compute the index of a step, as int32 arrays."""
        key_offsets = np.zeros(flat.rows + 1, np.int32)
        np.cumsum(flat.stops, out=key_offsets[1:])
        return cls(
            ids=flat.ids.astype(np.int32),
            positions=flat.positions.astype(np.int32),
            where=destinations(flat, block_tokens).astype(np.int32),
            offsets=flat.offsets,
            key_counts=flat.stops,
            key_offsets=key_offsets,
            tables=flat.tables,
        )

    def arrays(self) -> list[Any]:
        """Return all arrays, in the order of the fields."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @property
    def numbers(self) -> int:
        """Number of int32 of the packed index."""
        return sum(_padded(array.size) for array in self.arrays())

    def pack(self, into: npt.NDArray[np.int32]) -> None:
        """Write all arrays consecutively."""
        begin = 0
        for array in self.arrays():
            into[begin : begin + array.size] = array.ravel()
            begin += _padded(array.size)

    def unpack(self, packed: torch.Tensor) -> VarlenIndex:
        """Return views of a tensor that `pack` has filled, for an index of the same shapes."""
        views, begin = [], 0
        for array in self.arrays():
            views.append(packed[begin : begin + array.size].view(array.shape))
            begin += _padded(array.size)
        return VarlenIndex(*views)


def _padded(size: int) -> int:
    """Round up to 16 bytes, the alignment that kernels prefer."""
    return -(-size // 4) * 4


class VarlenAttention:
    """Implements `StepAttention` with FlashAttention.

    index        on the device of the memory
    max_query    most tokens of a row
    max_keys     an upper bound of the keys of a row, also for a replay of this step with other inputs
    """

    def __init__(self, memory: PagedMemory, index: VarlenIndex, *, max_query: int, max_keys: int) -> None:
        self._memory = memory
        self._index = index
        self._where = index.where.long()
        self._max_query = max_query
        self._max_keys = max_keys

    @classmethod
    def of(cls, memory: PagedMemory, index: VarlenIndex, flat: FlatStep) -> VarlenAttention:
        """Make the attention for exactly this step."""
        counts = flat.stops - flat.starts
        return cls(memory, index, max_query=int(counts.max()), max_keys=int(flat.stops.max()))

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masking: Masking
    ) -> torch.Tensor:
        """Store keys and values, and compute attention; the kernel has no soft cap."""
        assert masking.softcap is None
        self._memory.store(layer, self._where, keys, values)
        stored_keys, stored_values = self._memory[layer]
        return cuda.attend_varlen(
            query,
            stored_keys,
            stored_values,
            offsets=self._index.offsets,
            key_offsets=self._index.key_offsets,
            key_counts=self._index.key_counts,
            tables=self._index.tables,
            max_query=self._max_query,
            max_keys=self._max_keys,
            scale=masking.scale,
            window=window_of(masking.window, self._max_query),
        )


def window_of(window: int | None, max_query: int) -> tuple[int, int]:
    """Return how many keys to the left and right of its own key a query attends to; -1 for all.

    The queries of a row are its last tokens. If no row has more than one, there are no keys to the right, and
    only without a right limit does the kernel share keys among the heads of a group.
    """
    return (-1 if window is None else window - 1), (0 if max_query > 1 else -1)


def upload(index: VarlenIndex, device: torch.device) -> VarlenIndex:
    """Copy an index to the device in one transfer."""
    staging = torch.zeros(index.numbers, dtype=torch.int32)
    index.pack(staging.numpy())
    return index.unpack(cuda.to_device(staging, device))


def run_network(
    network: Any, index: VarlenIndex, attention: VarlenAttention, kept: torch.Tensor | int
) -> torch.Tensor:
    """Run a network over flattened rows, and return the logits of the tokens *kept*, 0 for all."""
    logits: torch.Tensor = network(
        input_ids=index.ids[None].long(),
        position_ids=index.positions[None].long(),
        use_cache=False,
        logits_to_keep=kept,
        headrace_step=attention,
    ).logits[0]
    return logits
