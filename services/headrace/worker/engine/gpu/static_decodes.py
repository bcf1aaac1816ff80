"""Steps of decodes in which nothing moves in memory, so that CUDA can replay them as graphs.

Between two steps of the same sequences hardly anything changes but numbers; launching some hundred
kernels one by one for that takes a small model longer than computing it. What is done about the sizes of
steps, padding and inputs is decided here and runs on any device; capturing is `cuda.GraphPool`'s part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.gpu.varlen import VarlenAttention, VarlenIndex, compute
from headrace.worker.engine.kv_memory import PagedMemory


class StaticDecodes:
    """Computes steps of decodes only.

    There is one computation for each size of a ladder; a step of fewer rows is padded with rows that live
    in a block nobody owns. All inputs lie in one buffer, which one copy fills.

    memory          its last block is the one nobody owns
    max_rows        most rows of a step
    context_length  no row has more tokens
    vocabulary      how many logits a row has
    capture         turns a function that queues work into one that queues the same again
    """

    def __init__(
        self,
        network: Any,
        memory: PagedMemory,
        *,
        max_rows: int,
        context_length: int,
        vocabulary: int,
        capture: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> None:
        self._network = network
        self._memory = memory
        self._width = -(-context_length // memory.block_tokens)
        self._context_length = context_length
        self._sizes = ladder(max_rows)
        largest = self._index(empty_step(), max_rows)
        self._host = torch.zeros(largest.numbers, dtype=torch.int32, pin_memory=memory.device.type == "cuda")
        self._inputs = torch.zeros(largest.numbers, dtype=torch.int32, device=memory.device)
        self._logits = torch.zeros(max_rows, vocabulary, dtype=memory.dtype, device=memory.device)
        self._replays: dict[int, Callable[[], None]] = {}
        with torch.inference_mode():
            for size in reversed(self._sizes):  # a pool of graphs wants the largest first
                # Capturing computes, and stores keys: into the block that nobody owns.
                index = self._index(empty_step(), size)
                self._fill(index)
                self._replays[size] = capture(self._computation(index))

    def takes(self, flat: FlatStep) -> bool:
        """Whether a step is one of these."""
        return flat.decodes_only and flat.rows <= self._sizes[-1]

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """See `Forward`; for steps that `takes` accepts."""
        size = next(size for size in self._sizes if size >= flat.rows)
        self._fill(self._index(flat, size))
        self._replays[size]()
        return self._logits[: flat.rows]

    def _index(self, flat: FlatStep, size: int) -> VarlenIndex:
        padded = pad_decodes(flat, size, width=self._width, scratch=self._memory.blocks - 1)
        return VarlenIndex.of(padded, self._memory.block_tokens)

    def _fill(self, index: VarlenIndex) -> None:
        # The step before has been waited for, so nothing reads the host's side any more.
        index.pack(self._host.numpy())
        self._inputs.copy_(self._host, non_blocking=True)

    def _computation(self, shape: VarlenIndex) -> Callable[[], None]:
        index = shape.unpack(self._inputs)
        rows = len(shape.used)

        def run() -> None:
            attention = VarlenAttention(self._memory, index, max_query=1, max_keys=self._context_length)
            # Into a buffer of our own: what a graph allocates, the next graph may overwrite.
            self._logits[:rows].copy_(compute(self._network, index, attention, 0))

        return run


def ladder(most: int) -> list[int]:
    """Return the sizes of steps to prepare for: padding costs at most 7 rows up to 64, an eighth above."""
    sizes = [size for size in (1, 2, 4, *range(8, 64, 8)) if size < most]
    size = 64
    while size < most:
        sizes.append(size)
        size += max(size // 8 // 8 * 8, 8)
    return [*sizes, most]


def empty_step() -> FlatStep:
    """A step of no rows."""
    none, nones = np.zeros(0, np.int32), np.zeros(0, np.int64)
    return FlatStep(
        ids=nones,
        positions=nones,
        row_of=none,
        offsets=np.zeros(1, np.int32),
        starts=none,
        stops=none,
        tables=np.zeros((0, 0), np.int32),
        sampling=nones,
        last=nones,
    )


def pad_decodes(flat: FlatStep, size: int, *, width: int, scratch: int) -> FlatStep:
    """Pad a step of decodes to *size* rows and tables of *width* blocks.

    The rows added compute token 0 at position 0 of the block *scratch*. They change nothing for others.
    """
    added = size - flat.rows
    tables = np.zeros((size, width), np.int32)
    tables[: flat.rows, : flat.tables.shape[1]] = flat.tables
    tables[flat.rows :, 0] = scratch
    return FlatStep(
        ids=np.pad(flat.ids, (0, added)),
        positions=np.pad(flat.positions, (0, added)),
        row_of=np.arange(size, dtype=np.int32),
        offsets=np.arange(size + 1, dtype=np.int32),
        starts=np.pad(flat.starts, (0, added)),
        stops=np.pad(flat.stops, (0, added), constant_values=1),
        tables=tables,
        sampling=np.arange(size, dtype=np.int64),
        last=np.arange(size, dtype=np.int64),
    )
