"""The index arithmetic of a step, against its definitions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.engine.flat_step import destinations, flatten
from headrace.worker.engine.interface import Row, SamplingParams

PARAMS = SamplingParams(seed=0, max_tokens=1)
BLOCK = 4


@st.composite
def steps(draw: st.DrawFn) -> list[Row]:
    """Return rows of any start and length, with tables that may be longer than needed."""
    rows = []
    for number in range(draw(st.integers(1, 6))):
        stop = draw(st.integers(1, 30))
        start = draw(st.integers(0, stop - 1))
        blocks = [100 * number + i for i in range(-(-stop // BLOCK) + draw(st.integers(0, 2)))]
        ids = [1000 * number + position for position in range(stop)]
        sample = draw(st.booleans())
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
