"""The echo engine rejects rows whose blocks hold anything but the ids that the row claims are computed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import Memo, Row, SamplingParams, Token

SIZE = 4
ONE, OTHER = list(range(10, 30)), list(range(50, 70))
PARAMS = SamplingParams(seed=0, max_tokens=100)


def engine() -> EchoEngine:
    return EchoEngine(context_length=64, max_running=4, block_tokens=SIZE)


def row(
    ids: Sequence[int],
    start: int,
    blocks: Sequence[int],
    *,
    stop: int | None = None,
    memo: Memo | None = None,
) -> Row:
    stop = len(ids) if stop is None else stop
    return Row(blocks, start, stop, ids, len(ids), stop == len(ids), PARAMS, memo or Memo())


def written(ids: Sequence[int], blocks: Sequence[int]) -> EchoEngine:
    """Return an engine that has computed these ids into these blocks."""
    one = engine()
    one.step([row(ids, 0, blocks)])
    return one


@pytest.mark.parametrize("length", [8, 10])
def test_a_row_continues_what_its_blocks_hold(length: int) -> None:
    one = written(ONE[:length], [3, 1, 2])

    assert one.step([row(ONE[: length + 1], length, [3, 1, 2])]) == [Token(ONE[0], 0.0)]


@pytest.mark.parametrize(
    ("start", "blocks"),
    [
        (10, [3, 2, 1]),  # full blocks exchanged
        (10, [1, 1, 2]),  # a wrong block before a right one
        (10, [3, 1, 3]),  # a wrong last block, which is partly used
        (12, [3, 1, 2]),  # a last block that is not full
        (10, [3, 1, 7]),  # a block that nothing was written to
        (10, [7, 1, 2]),
        (10, [3, 1, 10**6]),  # blocks that do not exist
        (10, [-1, 1, 2]),
    ],
)
def test_a_row_with_a_wrong_block_is_rejected(start: int, blocks: list[int]) -> None:
    one = written(ONE[:10], [3, 1, 2])

    with pytest.raises(RuntimeError, match="does not hold"):
        one.step([row(ONE[: start + 1], start, blocks)])


def test_equal_ids_after_another_prefix_are_rejected() -> None:
    """Keys and values depend on all ids before them."""
    one = written([*OTHER[:4], *ONE[4:10]], [0, 1, 2])
    one.step([row(ONE[:4], 0, [3])])

    for start in (8, 10):
        with pytest.raises(RuntimeError, match="block 1 does not hold"):
            one.step([row(ONE[: start + 1], start, [3, 1, 2])])


@pytest.mark.parametrize("length", [1, 4])
def test_a_sequence_whose_block_was_overwritten_is_rejected(length: int) -> None:
    """Also if an earlier row of it was accepted, and if the block is not full again."""
    one, memo = written(ONE[:8], [3, 1]), Memo()
    one.step([row(ONE[:9], 8, [3, 1, 2], memo=memo)])
    one.step([row(OTHER[:length], 0, [3])])

    with pytest.raises(RuntimeError, match="block 3 does not hold"):
        one.step([row(ONE[:10], 9, [3, 1, 2], memo=memo)])


def test_a_row_that_reads_what_another_one_of_the_step_writes_is_rejected() -> None:
    one = engine()

    with pytest.raises(RuntimeError, match="does not hold"):
        one.step([row(ONE[:4], 0, [0]), row(ONE[:5], 4, [0, 1])])


def test_a_chunk_that_ends_in_a_block_is_continued_there() -> None:
    one = engine()
    one.step([row(ONE, 0, range(5), stop=6)])
    one.step([row(ONE, 6, range(5), stop=15)])

    assert one.step([row(ONE, 15, range(5))]) == [Token(ONE[0], 0.0)]
