"""Fill the inputs of a device step from rows: plain numbers, on the host.

This runs once per step, while the device computes the step before, so its time matters: arrays are filled by
whole columns, and a step of decodes takes none of the detours that chunks of prompts need.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from headrace.worker.engine.gpu.slots import Slot, Slots
from headrace.worker.engine.gpu.step_inputs import LATEST, UNUSED, StepInputs
from headrace.worker.engine.interface import Row
from headrace.worker.engine.noise import noise_keys

Ints = npt.NDArray[np.int32]


def fill(
    inputs: StepInputs, rows: Sequence[Row], placed: Sequence[Slot], slots: Slots, block_tokens: int
) -> None:
    """Write a step into arrays on the host, padding included.

    inputs   numpy arrays of a shape that holds the rows
    placed   the slot of each row, from `Slots.begin_step`
    """
    count = len(rows)
    indices = np.array([slot.index for slot in placed], np.int32)
    stops = np.array([row.stop for row in rows], np.int32)
    inputs.slots[:count] = indices
    inputs.slots[count:] = slots.count
    inputs.stops[:count] = stops
    inputs.stops[count:] = 0
    inputs.samples[:count] = _samples(rows)
    inputs.samples[count:] = 0
    inputs.keys[:count] = noise_keys(slots.seeds[indices], stops.astype(np.uint64))
    slots.update_tables(rows, placed, inputs.table_places[:count], inputs.table_blocks[:count], block_tokens)
    inputs.table_places[count:] = slots.count * slots.width
    inputs.table_blocks[count:] = slots.spare
    starts = np.array([row.start for row in rows], np.int32)
    if inputs.shape.decodes and np.array_equal(starts, stops - 1):
        _fill_decodes(inputs, rows, indices, starts, slots, block_tokens)
    else:
        _fill_chunks(inputs, rows, indices, starts, stops, slots, block_tokens)


def advance(
    inputs: StepInputs, rows: Sequence[Row], placed: Sequence[Slot], slots: Slots, block_tokens: int
) -> None:
    """Turn the inputs of a step of decodes into those of the next one, in place.

    rows   all are pending, and continue the rows of that step in the same order, slots and blocks

    Writes what `fill` does, in less time: most of it is known from the step before.
    """
    count = len(rows)
    inputs.ids[:count] = LATEST
    for array in (inputs.positions, inputs.starts, inputs.stops, inputs.where):
        array[:count] += 1
    positions = inputs.positions[:count]
    for index in np.flatnonzero(positions % block_tokens == 0).tolist():
        inputs.where[index] = rows[index].blocks[positions[index] // block_tokens] * block_tokens
    seeds = slots.seeds[inputs.slots[:count]]
    inputs.keys[:count] = noise_keys(seeds, inputs.stops[:count].astype(np.uint64))
    slots.update_tables(rows, placed, inputs.table_places[:count], inputs.table_blocks[:count], block_tokens)


def masked_rows(rows: Sequence[Row]) -> list[int]:
    """Return the indices of the rows that masks restrict, in the order of their masks."""
    return [index for index, row in enumerate(rows) if row.params.grammar and row.sample]


def _samples(rows: Sequence[Row]) -> list[int]:
    """Return `StepInputs.samples` of rows."""
    samples = [int(row.sample) for row in rows]
    for number, index in enumerate(masked_rows(rows)):
        samples[index] = 2 + number
    return samples


def _fill_decodes(
    inputs: StepInputs, rows: Sequence[Row], indices: Ints, positions: Ints, slots: Slots, block_tokens: int
) -> None:
    """Fill a step in which every row is one token."""
    count, size = len(rows), inputs.shape.rows
    ordered = np.arange(size, dtype=np.int32)
    inputs.ids[:count] = [LATEST if row.pending else row.ids[row.start] for row in rows]
    inputs.ids[count:] = 0
    inputs.positions[:count] = inputs.starts[:count] = positions
    inputs.positions[count:] = inputs.starts[count:] = 0
    inputs.slot_of[:count] = indices
    inputs.slot_of[count:] = slots.count
    written = (positions // block_tokens).tolist()
    blocks = np.array([row.blocks[index] for row, index in zip(rows, written, strict=True)], np.int32)
    inputs.where[:count] = blocks * block_tokens + positions % block_tokens
    inputs.where[count:] = slots.spare * block_tokens
    inputs.offsets[:size] = ordered
    inputs.offsets[size] = size
    inputs.last[:] = ordered
    inputs.tile_rows[:count] = ordered[:count]
    inputs.tile_rows[count:] = UNUSED
    inputs.tile_offsets[:] = ordered


def _fill_chunks(
    inputs: StepInputs,
    rows: Sequence[Row],
    indices: Ints,
    starts: Ints,
    stops: Ints,
    slots: Slots,
    block_tokens: int,
) -> None:
    """Fill a step in which rows have any number of tokens."""
    count, tile = len(rows), inputs.shape.tile
    counts = stops - starts
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    total = int(offsets[-1])
    ids = chain.from_iterable((LATEST,) if row.pending else row.ids[row.start : row.stop] for row in rows)
    inputs.ids[:total] = np.fromiter(ids, np.int32, total)
    inputs.ids[total:] = 0
    positions = np.arange(total, dtype=np.int32) + np.repeat(starts - offsets[:-1], counts)
    inputs.positions[:total] = positions
    inputs.positions[total:] = 0
    inputs.slot_of[:total] = np.repeat(indices, counts)
    inputs.slot_of[total:] = slots.count
    # The blocks that a row writes, one entry per block, then one per token.
    first = starts // block_tokens
    written = (stops - 1) // block_tokens + 1 - first
    own = chain.from_iterable(
        row.blocks[begin : begin + length]
        for row, begin, length in zip(rows, first.tolist(), written.tolist(), strict=True)
    )
    blocks = np.fromiter(own, np.int32, int(written.sum()))
    begins = np.cumsum(written) - written - first
    places = positions // block_tokens + np.repeat(begins, counts)
    inputs.where[:total] = blocks[places] * block_tokens + positions % block_tokens
    inputs.where[total:] = slots.spare * block_tokens
    inputs.offsets[: count + 1] = offsets
    inputs.offsets[count + 1 :] = total
    inputs.starts[:count] = starts
    inputs.starts[count:] = 0
    inputs.last[:count] = offsets[1:] - 1
    inputs.last[count:] = 0
    tiles = -(-counts // tile)
    used = int(tiles.sum())
    tile_rows = np.repeat(np.arange(count, dtype=np.int32), tiles)
    inputs.tile_rows[:used] = tile_rows
    inputs.tile_rows[used:] = UNUSED
    within = np.arange(used, dtype=np.int32) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    inputs.tile_offsets[:used] = offsets[tile_rows] + within * tile
    inputs.tile_offsets[used:] = 0
