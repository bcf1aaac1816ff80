"""Lay a step out flat: the rows of all sequences one after the other, as plain arrays.

Every way to compute a step starts from a `FlatStep`. It knows block tables but no device, no layer and
no torch, so all index arithmetic can be tested as functions of numbers.
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


@dataclass(frozen=True, slots=True)
class FlatStep:
    """One step's tokens, and whose they are.

    ids        [tokens] what goes into the model
    positions  [tokens] where each stands in its sequence
    row_of     [tokens] which row each belongs to
    offsets    [rows + 1] where each row's tokens begin, and at last how many there are
    starts     [rows] position of each row's first token
    stops      [rows] position after its last: so many keys that token sees, its own included
    tables     [rows, width] each row's blocks, in order; what a row does not need is 0
    sampling   [sampling rows] which rows sample
    last       [sampling rows] where in the step their last tokens lie
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

    @property
    def rows(self) -> int:
        """How many sequences take part."""
        return len(self.starts)

    @property
    def tokens(self) -> int:
        """How many tokens are computed."""
        return len(self.ids)

    @property
    def decodes_only(self) -> bool:
        """Whether each row is one token that samples: what steps look like most of the time."""
        return self.tokens == self.rows == len(self.sampling)


def flatten(rows: Sequence[Row], block_tokens: int) -> FlatStep:
    """Lay rows out in their order.

    block_tokens   how many tokens a block holds
    """
    starts = np.array([row.start for row in rows], np.int32)
    stops = np.array([row.stop for row in rows], np.int32)
    counts = stops - starts
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    total = int(offsets[-1])
    needed = -(-stops // block_tokens)
    tables = np.zeros((len(rows), int(needed.max(initial=0))), np.int32)
    for table, row, count in zip(tables, rows, needed.tolist(), strict=True):
        table[:count] = row.blocks[:count]
    sampling = np.array([index for index, row in enumerate(rows) if row.sample], np.int64)
    ids = chain.from_iterable(row.ids[row.start : row.stop] for row in rows)
    return FlatStep(
        ids=np.fromiter(ids, np.int64, total),
        positions=np.arange(total, dtype=np.int64) + np.repeat(starts - offsets[:-1], counts),
        row_of=np.repeat(np.arange(len(rows), dtype=np.int32), counts),
        offsets=offsets,
        starts=starts,
        stops=stops,
        tables=tables,
        sampling=sampling,
        last=(offsets[sampling + 1] - 1).astype(np.int64),
    )


def destinations(flat: FlatStep, block_tokens: int) -> Longs:
    """Say where each token's key and value go, [tokens]: block x block_tokens + offset in the block."""
    blocks = flat.tables[flat.row_of, flat.positions // block_tokens]
    return blocks.astype(np.int64) * block_tokens + flat.positions % block_tokens
