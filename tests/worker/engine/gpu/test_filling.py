"""The inputs of a device step, compared with what each token and row should have."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.engine.gpu.filling import advance, fill
from headrace.worker.engine.gpu.graphs import Ladder, decode_sizes, mixed_sizes
from headrace.worker.engine.gpu.slots import NONE, Slots
from headrace.worker.engine.gpu.step_inputs import (
    LATEST,
    UNUSED,
    StepInputs,
    StepShape,
    packed_numbers,
)
from headrace.worker.engine.interface import Memo, Row, SamplingParams
from headrace.worker.engine.noise import noise_key

CPU = torch.device("cpu")
BLOCK = 4
WIDTH = 8
COUNT = 6
SPARE = 99
LADDER = Ladder(max_running=COUNT, step_tokens=64, tile=3)


def params(seed: int = 7) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=9)


def run_fill(slots: Slots, rows: Sequence[Row], shape: StepShape) -> StepInputs:
    """Fill a step, and do what the device does first: write new blocks into the tables."""
    packed = np.full(packed_numbers(shape), 12345, np.int32)
    inputs = StepInputs.over(packed, shape)
    fill(inputs, rows, slots.begin_step(rows), slots, BLOCK)
    flat = slots.tables.view(-1)
    flat[torch.from_numpy(inputs.table_places.astype(np.int64))] = torch.from_numpy(inputs.table_blocks)
    return inputs


@st.composite
def steps(draw: st.DrawFn) -> list[Row]:
    """Rows of different sequences: decodes and chunks, with scattered blocks."""
    rows = []
    numbers = itertools.count(1)
    decodes = draw(st.booleans())
    for _ in range(draw(st.integers(1, COUNT))):
        stop = draw(st.integers(1, BLOCK * WIDTH))
        start = stop - 1 if decodes else draw(st.integers(max(stop - 10, 0), stop - 1))
        blocks = [7 * next(numbers) % 97 for _ in range(-(-stop // BLOCK) + draw(st.integers(0, 2)))]
        pending = stop - start == 1 and draw(st.booleans())
        ids = [draw(st.integers(0, 50)) for _ in range(stop - pending)]
        seed = draw(st.integers(0, 2**64 - 1))
        rows.append(
            Row(blocks, start, stop, ids, 1, draw(st.booleans()) or pending, params(seed), pending=pending)
        )
    return rows


@given(steps())
def test_every_token_has_its_place(rows: list[Row]) -> None:
    tokens = sum(row.stop - row.start for row in rows)
    shape = LADDER.choose(len(rows), tokens)
    slots = Slots(COUNT, WIDTH, spare=SPARE, device=CPU)

    inputs = run_fill(slots, rows, shape)

    token = 0
    tiles: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        slot = row.memo.kept.index
        assert inputs.slots[index] == slot
        assert (inputs.offsets[index], inputs.starts[index], inputs.stops[index]) == (
            token,
            row.start,
            row.stop,
        )
        assert inputs.samples[index] == row.sample
        assert tuple(inputs.keys[index]) == noise_key(row.params.seed, row.stop)
        needed = -(-row.stop // BLOCK)
        assert slots.tables[slot, :needed].tolist() == list(row.blocks[:needed])
        tiles += [(index, first) for first in range(token, token + row.stop - row.start, shape.tile)]
        for position in range(row.start, row.stop):
            assert inputs.ids[token] == (LATEST if row.pending else row.ids[position])
            assert inputs.positions[token] == position
            assert inputs.slot_of[token] == slot
            assert inputs.where[token] == row.blocks[position // BLOCK] * BLOCK + position % BLOCK
            token += 1
        assert inputs.last[index] == token - 1
    assert inputs.offsets[len(rows)] == token == tokens
    assert list(zip(inputs.tile_rows, inputs.tile_offsets, strict=True))[: len(tiles)] == tiles


@given(steps())
def test_padding_touches_nothing_that_a_row_uses(rows: list[Row]) -> None:
    tokens = sum(row.stop - row.start for row in rows)
    shape = LADDER.choose(len(rows), tokens)
    slots = Slots(COUNT, WIDTH, spare=SPARE, device=CPU)

    inputs = run_fill(slots, rows, shape)

    added = slice(len(rows), None)
    assert set(inputs.slots[added]) <= {COUNT}
    assert set(inputs.stops[added]) | set(inputs.samples[added]) <= {0}
    assert set(inputs.slot_of[tokens:]) <= {COUNT}
    assert set(inputs.where[tokens:]) <= {SPARE * BLOCK}
    assert set(inputs.ids[tokens:]) | set(inputs.positions[tokens:]) <= {0}
    used = sum(-(-(row.stop - row.start) // shape.tile) for row in rows)
    assert set(inputs.tile_rows[used:]) <= {UNUSED}
    assert slots.tables[COUNT].tolist() == [SPARE] * WIDTH


@given(st.lists(st.integers(1, BLOCK * 3), min_size=1, max_size=COUNT), st.integers(1, BLOCK + 2))
def test_a_step_that_continues_the_one_before_is_filled_alike(stops: list[int], steps: int) -> None:
    """Over borders of blocks."""
    shape = LADDER.choose(len(stops), len(stops))
    slots = Slots(COUNT, WIDTH, spare=SPARE, device=CPU)
    rows = [
        Row([7 * index + place for place in range(WIDTH)], stop - 1, stop, [5] * stop, 1, True, params(index))
        for index, stop in enumerate(stops)
    ]
    packed = np.full(packed_numbers(shape), 12345, np.int32)
    fill(StepInputs.over(packed, shape), rows, slots.begin_step(rows), slots, BLOCK)

    for _ in range(steps):
        rows = [replace(row, start=row.stop, stop=row.stop + 1, pending=True) for row in rows]
        placed = slots.begin_step(rows)
        advance(StepInputs.over(packed, shape), rows, placed, slots, BLOCK)

        for slot in placed:
            slot.version = -2  # everything is uploaded anew, to other places of the inputs
        anew = np.full(packed_numbers(shape), 12345, np.int32)
        expected = StepInputs.over(anew, shape)
        fill(expected, rows, placed, slots, BLOCK)
        found = StepInputs.over(packed, shape)
        for name in ("ids", "positions", "slot_of", "where", "slots", "offsets", "starts", "stops"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        for name in ("last", "samples", "keys", "tile_rows", "tile_offsets"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_a_table_follows_its_sequence_over_steps() -> None:
    """It grows by one block, by several, and is replaced when a block was exchanged."""
    slots = Slots(COUNT, WIDTH, spare=SPARE, device=CPU)
    memo = Memo()

    def table_after(blocks: list[int], stop: int, version: int) -> list[int]:
        row = Row(blocks, stop - 1, stop, [5] * stop, 1, True, params(), memo, version=version)
        run_fill(slots, [row], StepShape(1, 1, 1))
        needed: list[int] = slots.tables[memo.kept.index, : -(-stop // BLOCK)].tolist()
        return needed

    assert table_after([10], 3, 1) == [10]
    assert table_after([10, 11], 5, 1) == [10, 11]
    assert table_after([10, 11, 12, 13], 15, 1) == [10, 11, 12, 13]
    assert table_after([10, 55, 12, 13], 16, 2) == [10, 55, 12, 13]


def test_a_sequence_keeps_its_slot_until_others_need_it() -> None:
    slots = Slots(2, WIDTH, spare=SPARE, device=CPU)

    def row() -> Row:
        return Row([1], 0, 1, [5], 1, True, params())

    first, second, third = row(), row(), row()
    kept = slots.begin_step([first, second])
    assert slots.begin_step([second]) == [kept[1]]

    (new,) = slots.begin_step([third])

    assert new.index == 0  # the first sequence was in no step for the longest time
    assert kept[0].index == NONE
    assert slots.begin_step([third, second]) == [new, kept[1]]
    assert slots.begin_step([first])[0] is not kept[0]


def test_forgotten_slots_are_assigned_anew() -> None:
    slots = Slots(2, WIDTH, spare=SPARE, device=CPU)
    row = Row([1], 0, 1, [5], 1, True, params())
    placed = slots.begin_step([row])

    slots.forget(placed)
    slots.forget(placed)

    assert slots.begin_step([row]) != placed
    assert slots.begin_step([row, Row([2], 0, 1, [5], 1, True, params())])[1].index != row.memo.kept.index


@pytest.mark.parametrize("most", [1, 2, 5, 32, 64, 100, 256, 1024])
def test_padding_of_decode_steps_is_at_most_seven_rows_or_an_eighth(most: int) -> None:
    sizes = decode_sizes(most)

    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows <= max(7, rows // 8)


@pytest.mark.parametrize("most", [1, 128, 300, 1024, 2048, 8192])
def test_padding_of_steps_with_prompts_is_less_than_128_tokens_or_a_quarter(most: int) -> None:
    sizes = mixed_sizes(most)

    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for tokens in range(1, most + 1):
        size = next(size for size in sizes if size >= tokens)
        assert size - tokens < max(128, tokens / 4)


def test_a_step_runs_in_the_smallest_shape_that_holds_it() -> None:
    ladder = Ladder(max_running=256, step_tokens=2048, tile=16)

    assert ladder.choose(3, 3) == StepShape(4, 4, 1)
    assert ladder.choose(3, 50) == StepShape(128, 128, 16)
    assert ladder.choose(200, 201) == StepShape(256, 256, 16)
    assert ladder.choose(256, 2048) == StepShape(2048, 256, 16)
    assert mixed_sizes(300) == [128, 256, 300]
    assert mixed_sizes(64) == [64]
