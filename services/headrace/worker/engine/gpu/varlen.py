"""Attention on CUDA: one call of a variable-length kernel per layer, for all rows of a step.

The kernel is torch's FlashAttention over paged memory, behind `cuda.attend_varlen`. What it is told about
a step is worked out here, in plain arrays, and copied to the device in one piece.
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

# FlashAttention 2, which torch brings along, takes paged keys in multiples of 256 tokens only.
BLOCK_TOKENS = 256


@dataclasses.dataclass(frozen=True, slots=True)
class VarlenIndex:
    """What the kernel is told about a step; numpy arrays on the host or tensors on the device.

    ids        [tokens]
    positions  [tokens]
    where      [tokens] where keys and values go, see `flat_step.destinations`
    offsets    [rows + 1] where each row's tokens begin
    used       [rows] how many keys each row has
    held       [rows + 1] their running sum
    tables     [rows, width]
    """

    ids: Any
    positions: Any
    where: Any
    offsets: Any
    used: Any
    held: Any
    tables: Any

    @classmethod
    def of(cls, flat: FlatStep, block_tokens: int) -> VarlenIndex:
        """Work it out, as int32 arrays."""
        held = np.zeros(flat.rows + 1, np.int32)
        np.cumsum(flat.stops, out=held[1:])
        return cls(
            ids=flat.ids.astype(np.int32),
            positions=flat.positions.astype(np.int32),
            where=destinations(flat, block_tokens).astype(np.int32),
            offsets=flat.offsets,
            used=flat.stops,
            held=held,
            tables=flat.tables,
        )

    def arrays(self) -> list[Any]:
        """All of it, in the order of the fields."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @property
    def numbers(self) -> int:
        """How many int32 all of it takes when packed."""
        return sum(_padded(array.size) for array in self.arrays())

    def pack(self, into: npt.NDArray[np.int32]) -> None:
        """Write all arrays one after the other."""
        begin = 0
        for array in self.arrays():
            into[begin : begin + array.size] = array.ravel()
            begin += _padded(array.size)

    def unpack(self, packed: torch.Tensor) -> VarlenIndex:
        """Find in a tensor what `pack` has written for an index of the same shapes."""
        views, begin = [], 0
        for array in self.arrays():
            views.append(packed[begin : begin + array.size].view(array.shape))
            begin += _padded(array.size)
        return VarlenIndex(*views)


def _padded(size: int) -> int:
    """Round up to 16 bytes, where kernels like their arrays to begin."""
    return -(-size // 4) * 4


class VarlenAttention:
    """See `StepAttention`.

    index        on the memory's device
    max_query    most tokens of a row
    max_keys     no row has more keys; also the bound for whoever replays this step with other numbers
    """

    def __init__(self, memory: PagedMemory, index: VarlenIndex, *, max_query: int, max_keys: int) -> None:
        self._memory = memory
        self._index = index
        self._where = index.where.long()
        self._max_query = max_query
        self._max_keys = max_keys

    @classmethod
    def of(cls, memory: PagedMemory, index: VarlenIndex, flat: FlatStep) -> VarlenAttention:
        """Make it for exactly this step."""
        counts = flat.stops - flat.starts
        return cls(memory, index, max_query=int(counts.max()), max_keys=int(flat.stops.max()))

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masking: Masking
    ) -> torch.Tensor:
        """Store and attend; the soft cap is one that the kernel does not know."""
        assert masking.softcap is None
        self._memory.store(layer, self._where, keys, values)
        held_keys, held_values = self._memory[layer]
        return cuda.attend_varlen(
            query,
            held_keys,
            held_values,
            offsets=self._index.offsets,
            held=self._index.held,
            used=self._index.used,
            tables=self._index.tables,
            max_query=self._max_query,
            max_keys=self._max_keys,
            scale=masking.scale,
            window=window_of(masking.window, self._max_query),
        )


def window_of(window: int | None, max_query: int) -> tuple[int, int]:
    """Return how many keys to the left and right of its own a query sees; -1 for all.

    A row's queries are its last tokens. Where no row has more than one, nothing is to the right, and the
    kernel shares keys among the heads of a group only if it is not told to hide what is there.
    """
    return (-1 if window is None else window - 1), (0 if max_query > 1 else -1)


def upload(index: VarlenIndex, device: torch.device) -> VarlenIndex:
    """Copy an index to the device, as one piece."""
    staging = torch.zeros(index.numbers, dtype=torch.int32)
    index.pack(staging.numpy())
    return index.unpack(cuda.to_device(staging, device))


def compute(
    network: Any, index: VarlenIndex, attention: VarlenAttention, kept: torch.Tensor | int
) -> torch.Tensor:
    """Run a network over flattened rows; returns the logits of the tokens *kept*, 0 for all."""
    logits: torch.Tensor = network(
        input_ids=index.ids[None].long(),
        position_ids=index.positions[None].long(),
        use_cache=False,
        logits_to_keep=kept,
        headrace_step=attention,
    ).logits[0]
    return logits
