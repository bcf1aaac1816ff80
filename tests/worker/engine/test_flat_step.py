"""The index arithmetic of a step, against its definitions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.engine.flat_step import destinations, flatten
from headrace.worker.engine.gpu.static_decodes import empty_step, graph_sizes, pad_decodes
from headrace.worker.engine.gpu.varlen import VarlenIndex, upload
from headrace.worker.engine.interface import Row, SamplingParams

PARAMS = SamplingParams(seed=0, max_tokens=1)
BLOCK = 4


@st.composite
def steps(draw: st.DrawFn, decodes: bool = False) -> list[Row]:
    """Return rows of any start and length, with tables that may be longer than needed."""
    rows = []
    for number in range(draw(st.integers(1, 6))):
        stop = draw(st.integers(1, 30))
        start = stop - 1 if decodes else draw(st.integers(0, stop - 1))
        blocks = [100 * number + i for i in range(-(-stop // BLOCK) + draw(st.integers(0, 2)))]
        ids = [1000 * number + position for position in range(stop)]
        sample = decodes or draw(st.booleans())
        rows.append(Row(blocks[::-1], start, stop, ids, stop, sample, PARAMS))
    return rows


@given(steps())
def test_every_token_of_every_row_is_placed_correctly(rows: list[Row]) -> None:
    flat = flatten(rows, BLOCK)
    where = destinations(flat, BLOCK)

    index = 0
    for number, row in enumerate(rows):
        assert flat.offsets[number] == index
        assert (flat.starts[number], flat.stops[number]) == (row.start, row.stop)
        needed = -(-row.stop // BLOCK)
        assert list(flat.tables[number, :needed]) == list(row.blocks[:needed])
        for position in range(row.start, row.stop):
            assert flat.ids[index] == row.ids[position]
            assert flat.positions[index] == position
            assert flat.row_of[index] == number
            assert where[index] == row.blocks[position // BLOCK] * BLOCK + position % BLOCK
            index += 1
    assert (flat.tokens, flat.rows) == (index, len(rows)) == (flat.offsets[-1], flat.rows)


@given(steps())
def test_the_last_token_of_each_row_that_samples_is_found(rows: list[Row]) -> None:
    flat = flatten(rows, BLOCK)

    assert list(flat.sampling) == [number for number, row in enumerate(rows) if row.sample]
    assert list(flat.ids[flat.last]) == [row.ids[row.stop - 1] for row in rows if row.sample]
    decodes = all(row.stop - row.start == 1 and row.sample for row in rows)
    assert flat.decodes_only == decodes


@given(steps(), st.integers(0, 3))
def test_the_kernels_arguments_are_packed_and_unpacked_unchanged(rows: list[Row], spare: int) -> None:
    import torch

    index = VarlenIndex.of(flatten(rows, BLOCK), BLOCK)
    packed = np.full(index.numbers + spare, -1, np.int32)

    index.pack(packed)
    apart = index.unpack(torch.from_numpy(packed))

    for before, after, uploaded in zip(
        index.arrays(), apart.arrays(), upload(index, torch.device("cpu")).arrays(), strict=True
    ):
        assert after.dtype == torch.int32
        assert after.storage_offset() % 4 == 0
        assert np.array_equal(before, after.numpy())
        assert np.array_equal(before, uploaded.numpy())
    assert list(index.key_offsets) == [0, *np.cumsum([row.stop for row in rows])]


@given(steps(decodes=True), st.integers(0, 5), st.integers(0, 3))
def test_padding_rows_write_only_to_the_scratch_block(rows: list[Row], more: int, wider: int) -> None:
    flat = flatten(rows, BLOCK)
    size, width, scratch = len(rows) + more, flat.tables.shape[1] + wider, 9999

    padded = pad_decodes(flat, size, width=width, spare=scratch)

    assert padded.tables.shape == (size, width)
    assert padded.decodes_only
    where = destinations(padded, BLOCK)
    assert list(where[: len(rows)]) == list(destinations(flat, BLOCK))
    assert set(where[len(rows) :]) <= {scratch * BLOCK}
    assert list(padded.stops[len(rows) :]) == [1] * more
    again = flatten([*rows, *[Row([scratch], 0, 1, [0], 1, True, PARAMS)] * more], BLOCK)
    for name in ("ids", "positions", "row_of", "offsets", "starts", "stops", "sampling", "last"):
        assert np.array_equal(getattr(padded, name), getattr(again, name)), name


def test_an_empty_step_can_be_padded() -> None:
    padded = pad_decodes(empty_step(), 3, width=2, spare=7)

    assert list(destinations(padded, BLOCK)) == [28, 28, 28]


@given(st.integers(1, 1024))
def test_a_size_is_close_above_any_number_of_rows(most: int) -> None:
    sizes = graph_sizes(most)

    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < max(8, rows / 8 + 1)
    assert len(sizes) <= 40
