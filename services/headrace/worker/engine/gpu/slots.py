"""Slots: the state that a device keeps of each running sequence between its steps.

A slot is an index into tensors on the device: the block tables here, tokens, parameters and counts in
`sampler`. A sequence refers to its slot by `Row.memo`. A slot is taken from the sequence that was in no step
for the longest time; if that one runs again, it gets another slot, and its state is uploaded anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.gpu.cuda import to_device
from headrace.worker.engine.interface import Fault, Row

Ints = npt.NDArray[np.int32]

NONE = -1  # the index of a slot that was taken away


class Slot:
    """The slot of one sequence.

    index      in the tensors on the device; NONE if it was taken away
    version    `Row.version` of the blocks in its table
    uploaded   number of entries of its table
    counted    number of ids that the sampler has counted, the latest sampled token included; -1 before
               parameters are uploaded
    watched    whether parameters must be uploaded, or need these counts
    fault      why the parameters of the sequence cannot be applied; None if they can
    used       number of the last step that it was in
    """

    __slots__ = ("counted", "fault", "index", "uploaded", "used", "version", "watched")

    def __init__(self, index: int) -> None:
        self.index = index
        self.version = -1
        self.uploaded = 0
        self.counted = -1
        self.watched = True
        self.fault: Fault | None = None
        self.used = 0


class Slots:
    """The slots of an engine, and the block tables of their sequences.

    count    number of slots; the device's tensors have one more, for padding rows
    width    most blocks of a sequence
    spare    the block that padding tokens are written to

    tables   [count + 1, width] int32 on the device: block numbers of each slot's sequence
    seeds    [count + 1] seed of each slot's sequence
    """

    def __init__(self, count: int, width: int, *, spare: int, device: torch.device) -> None:
        self.count, self.width = count, width
        self.tables = torch.full((count + 1, width), spare, dtype=torch.int32, device=device)
        self.seeds = np.zeros(count + 1, np.uint64)
        self.spare = spare
        self._device = device
        self._owners: list[Slot | None] = [None] * count
        self._free = list(range(count - 1, -1, -1))
        self._step = 0

    def begin_step(self, rows: Sequence[Row]) -> list[Slot]:
        """Return the slot of each row, each a different one; new ones for sequences without."""
        self._step += 1
        step = self._step
        slots: list[Slot | None] = []
        missing = False
        for row in rows:
            slot = row.memo.kept
            if slot is not None and slot.index >= 0:
                slot.used = step
                slots.append(slot)
            else:
                missing = True
                slots.append(None)
        if not missing:
            return slots  # type: ignore[return-value]
        return [slot or self._assign(row) for slot, row in zip(slots, rows, strict=True)]

    def update_tables(
        self, rows: Sequence[Row], slots: Sequence[Slot], places: Ints, blocks: Ints, block_tokens: int
    ) -> None:
        """Bring the block tables on the device up to date for a step.

        places, blocks   [rows] `StepInputs.table_places` and `.table_blocks`: a sequence that grew by one
                         block is updated by the step itself. This writes a no-op for all others

        Whatever else changed is copied now; the device runs the copy before the step.
        """
        width = self.width
        places.fill(self.count * width)
        blocks.fill(self.spare)
        changed: list[tuple[int, Sequence[int]]] = []
        for index, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            begin = slot.uploaded
            if slot.version == row.version:
                if row.stop <= begin * block_tokens:
                    continue
            else:
                begin, slot.version = 0, row.version
            needed = (row.stop - 1) // block_tokens + 1
            slot.uploaded = needed
            if needed == begin + 1:
                places[index] = slot.index * width + begin
                blocks[index] = row.blocks[begin]
            else:
                changed.append((slot.index * width + begin, row.blocks[begin:needed]))
        if changed:
            self._copy(changed)

    def _copy(self, changed: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Write blocks at places of the flat tables."""
        counts = [len(own) for _, own in changed]
        total = sum(counts)
        update = np.empty((2, total), np.int64)
        begins = np.array([begin for begin, _ in changed])
        ends = np.cumsum(counts)
        update[0] = np.arange(total) + np.repeat(begins - (ends - counts), counts)
        update[1] = np.fromiter(chain.from_iterable(own for _, own in changed), np.int64, total)
        copied = to_device(torch.from_numpy(update), self._device)
        self.tables.view(-1).index_copy_(0, copied[0], copied[1].int())

    def _assign(self, row: Row) -> Slot:
        index = self._free.pop() if self._free else self._take()
        slot = Slot(index)
        slot.used = self._step
        self._owners[index] = row.memo.kept = slot
        self.seeds[index] = row.params.seed
        return slot

    def _take(self) -> int:
        oldest = min((slot for slot in self._owners if slot is not None), key=lambda slot: slot.used)
        index, oldest.index = oldest.index, NONE
        return index

    def forget(self, slots: Sequence[Slot]) -> None:
        """Take slots away, because the state of their sequences on the device is not known any more."""
        for slot in slots:
            if slot.index != NONE:
                self._owners[slot.index] = None
                self._free.append(slot.index)
                slot.index = NONE
