"""Compute steps of decodes with fixed addresses and sizes, so that CUDA can replay them as graphs.

Two decode steps of the same sequences differ only in their inputs. For a small model, launching some hundred
kernels one by one takes longer than computing them. This module chooses the sizes of steps, and handles
padding and inputs; it runs on any device. `cuda.GraphPool` captures the graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.gpu.varlen import VarlenAttention, VarlenIndex, run_network
from headrace.worker.engine.kv_memory import PagedMemory


class StaticDecodes:
    """Computes steps that contain only decodes.

    There is one captured computation per size of `graph_sizes`. A step with fewer rows is padded with rows
    that use a spare block. All inputs are in one buffer, which is filled by one copy.

    memory          its last block is the spare block
    max_rows        most rows of a step
    context_length  most tokens of a row
    vocabulary      number of logits of a row
    capture         converts a function that queues work to one that queues the same work again
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
        self._sizes = graph_sizes(max_rows)
        largest = self._index(empty_step(), max_rows)
        self._host = torch.zeros(largest.numbers, dtype=torch.int32, pin_memory=memory.device.type == "cuda")
        self._inputs = torch.zeros(largest.numbers, dtype=torch.int32, device=memory.device)
        self._logits = torch.zeros(max_rows, vocabulary, dtype=memory.dtype, device=memory.device)
        self._replays: dict[int, Callable[[], None]] = {}
        with torch.inference_mode():
            for size in reversed(self._sizes):  # the graph pool needs the largest first
                # Capturing also computes, and stores keys in the spare block.
                index = self._index(empty_step(), size)
                self._fill(index)
                self._replays[size] = capture(self._computation(index))

    def accepts(self, flat: FlatStep) -> bool:
        """Return whether a step can be computed here."""
        return flat.decodes_only and flat.rows <= self._sizes[-1]

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """See `Forward`; only for steps that `accepts` returns true for."""
        size = next(size for size in self._sizes if size >= flat.rows)
        self._fill(self._index(flat, size))
        self._replays[size]()
        return self._logits[: flat.rows]

    def _index(self, flat: FlatStep, size: int) -> VarlenIndex:
        padded = pad_decodes(flat, size, width=self._width, spare=self._memory.blocks - 1)
        return VarlenIndex.of(padded, self._memory.block_tokens)

    def _fill(self, index: VarlenIndex) -> None:
        # The previous step is complete, so nothing reads the host buffer any more.
        index.pack(self._host.numpy())
        self._inputs.copy_(self._host, non_blocking=True)

    def _computation(self, shape: VarlenIndex) -> Callable[[], None]:
        index = shape.unpack(self._inputs)
        rows = len(shape.key_counts)

        def run() -> None:
            attention = VarlenAttention(self._memory, index, max_query=1, max_keys=self._context_length)
            # Copy to our own buffer: the next graph may overwrite the memory of this graph.
            self._logits[:rows].copy_(run_network(self._network, index, attention, 0))

        return run


def graph_sizes(most: int) -> list[int]:
    """Return the sizes of steps to capture: padding is at most 7 rows up to 64 rows, and an eighth above."""
    sizes = [size for size in (1, 2, 4, *range(8, 64, 8)) if size < most]
    size = 64
    while size < most:
        sizes.append(size)
        size += max(size // 8 // 8 * 8, 8)
    return [*sizes, most]


def empty_step() -> FlatStep:
    """Return a step without rows."""
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


def pad_decodes(flat: FlatStep, size: int, *, width: int, spare: int) -> FlatStep:
    """Pad a step of decodes to *size* rows and tables of *width* blocks.

    The added rows compute token 0 at position 0 of the block *spare*. They do not affect the other rows.
    """
    added = size - flat.rows
    tables = np.zeros((size, width), np.int32)
    tables[: flat.rows, : flat.tables.shape[1]] = flat.tables
    tables[flat.rows :, 0] = spare
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
