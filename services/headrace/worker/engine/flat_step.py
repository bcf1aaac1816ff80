"""Flatten a step: the tokens of all rows one after the other, as plain arrays.

Every implementation of a step starts from a `FlatStep`. It knows block tables, but no device, no layer and
no torch, so that all index arithmetic can be tested as plain functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from headrace.worker.engine.interface import Row

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

_NONE = np.zeros(0, np.int64)
_NUMBERS = np.arange(4096)
_NUMBERS.flags.writeable = False


@dataclass(frozen=True, slots=True)
class FlatStep:
    """One step's tokens, and the rows that they belong to.

    ids        [tokens] input ids of the model
    positions  [tokens] position of each token in its sequence
    row_of     [tokens] index of its row
    offsets    [rows + 1] index of each row's first token, and finally the number of tokens
    starts     [rows] position of each row's first token
    stops      [rows] position after its last token, drafts included: the keys which that token attends to
    tables     [rows, width] each row's blocks, in order, contiguous; unneeded entries are 0
    sampling   [sampled] index of the row of each token to sample, in order: a row with a draft samples once
               more than the draft has tokens
    last       [sampled] index of the token before it
    scored     [scored] index of the token before each one of `Row.scored`, of all rows in order
    """

    ids: Longs
    positions: Longs
    row_of: Ints
    offsets: Ints
    starts: Ints
    stops: Ints
    tables: Ints
    sampling: Longs
    last: Longs
    scored: Longs

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.starts)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids)


def flatten(rows: Sequence[Row], block_tokens: int) -> FlatStep:
    """Flatten rows, in their order.

    block_tokens   tokens per block
    """
    if all(row.stop - row.start == 1 and row.sample and not row.draft and not row.scored for row in rows):
        return _flatten_decodes(rows, block_tokens)
    starts = np.array([row.start for row in rows], np.int32)
    stops = np.array([row.stop + len(row.draft) for row in rows], np.int32)
    counts = stops - starts
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    total = int(offsets[-1])
    sampled = [(index, place) for index, row in enumerate(rows) if row.sample for place in _sampled(row)]
    sampling, places = np.array(sampled, np.int64).reshape(-1, 2).T
    ids = chain.from_iterable(chain(row.ids[row.start : row.stop], row.draft) for row in rows)
    return FlatStep(
        ids=np.fromiter(ids, np.int64, total),
        positions=np.arange(total, dtype=np.int64) + np.repeat(starts - offsets[:-1], counts),
        row_of=np.repeat(np.arange(len(rows), dtype=np.int32), counts),
        offsets=offsets,
        starts=starts,
        stops=stops,
        tables=_tables(rows, (-(-stops // block_tokens)).tolist()),
        sampling=sampling,
        last=offsets[sampling + 1] - 1 - places,
        scored=scored_places(rows, offsets),
    )


def _flatten_decodes(rows: Sequence[Row], block_tokens: int) -> FlatStep:
    """Flatten rows that all sample after their only token.

    Most steps are such. The caches of a CPU then hold little but weights, so each call costs much more than
    it does in a loop: this takes a third of the time of the general case.
    """
    positions = np.array([row.start for row in rows], np.int64)
    starts = positions.astype(np.int32)
    numbers = _NUMBERS[: len(rows) + 1] if len(rows) < len(_NUMBERS) else np.arange(len(rows) + 1)
    offsets = numbers.astype(np.int32)
    return FlatStep(
        ids=np.array([row.ids[row.start] for row in rows], np.int64),
        positions=positions,
        row_of=offsets[:-1],
        offsets=offsets,
        starts=starts,
        stops=starts + 1,
        tables=_tables(rows, [row.start // block_tokens + 1 for row in rows]),
        sampling=numbers[:-1],
        last=numbers[:-1],
        scored=_NONE,
    )


def _tables(rows: Sequence[Row], needed: Sequence[int]) -> Ints:
    """Return the first blocks of each row, as many as it needs."""
    tables = np.zeros((len(rows), max(needed, default=0)), np.int32)
    for table, row, count in zip(tables, rows, needed, strict=True):
        table[:count] = row.blocks[:count]
    return tables


def _sampled(row: Row) -> range:
    """Return the tokens after which a row samples, as distances from its last one."""
    return range(len(row.draft), -1, -1)


def scored_places(rows: Sequence[Row], offsets: Ints) -> Longs:
    """Return `FlatStep.scored`, given the index of each row's first token."""
    scoring = [index for index, row in enumerate(rows) if row.scored]
    if not scoring:  # nearly always; the offsets are not read then
        return _NONE
    return np.concatenate(
        [
            np.arange(row.scored.start, row.scored.stop) + (int(offsets[index]) - row.start - 1)
            for index in scoring
            for row in (rows[index],)
        ]
    )


def destinations(flat: FlatStep, block_tokens: int) -> Longs:
    """Return each token's place in KV memory, [tokens]: block x block_tokens + offset in the block."""
    blocks = flat.tables[flat.row_of, flat.positions // block_tokens]
    return blocks.astype(np.int64) * block_tokens + flat.positions % block_tokens
