"""The inputs of a device step: arrays of fixed sizes in one packed buffer, filled by one copy from the host.

Steps of equal `StepShape` differ only in these numbers, so CUDA can replay one as a captured graph. A step
with fewer rows or tokens is padded. What changes rarely, such as block tables, is in tensors of its own, see
`slots`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

LATEST = (
    -1
)  # in `StepInputs.ids`: the token that the slot's previous row sampled, which the host may not know
UNUSED = -1  # in `StepInputs.tile_rows`: a query tile without tokens


@dataclass(frozen=True, slots=True)
class StepShape:
    """The padded sizes of a step.

    tokens   number of tokens; at least rows
    rows     number of rows; each has logits, though not all of them are sampled
    tile     tokens of a query tile: attention computes each row in tiles of this many tokens. 1 if every row
             is one token
    """

    tokens: int
    rows: int
    tile: int

    @property
    def decodes(self) -> bool:
        """Whether every row is one token."""
        return self.tile == 1 and self.tokens == self.rows

    @property
    def tiles(self) -> int:
        """Number of query tiles that suffice for any rows of this shape."""
        return self.rows if self.decodes else self.tokens // self.tile + self.rows


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The arrays of one step: int32 tensors on the device, or numpy arrays on the host.

    shape          the padded sizes
    ids            [tokens] input ids of the model; LATEST for the token that the slot sampled last
    positions      [tokens] position of each token in its sequence
    slot_of        [tokens] slot of its row
    where          [tokens] place of its key and value: block x block_tokens + offset in the block
    slots          [rows] slot of each row: index of the state kept for its sequence, such as its table
    offsets        [rows + 1] index of each row's first token, and finally the number of tokens
    starts         [rows] position of each row's first token
    stops          [rows] position after its last token: the number of keys which that token attends to
    last           [rows] index of its last token
    samples        [rows] 0 if its next token is not sampled, 1 if it is, and 2 + n if the mask with number n
                   restricts it
    keys           [rows, 2] key of the sampling noise, see `noise.noise_key`
    tile_rows      [tiles] row of each query tile; UNUSED after the last tile
    tile_offsets   [tiles] index of each tile's first token; the tile ends with its row
    table_places   [rows] where to write a row's new block in the flat block tables before the step
    table_blocks   [rows] number of that block

    Padding tokens have id 0 and position 0, and are written to a block that nothing reads. Padding rows have
    the last slot, no tokens (stop 0) and no tile. Whatever is computed for padding is undefined and ignored;
    it does not affect other rows.
    """

    shape: StepShape
    ids: Any
    positions: Any
    slot_of: Any
    where: Any
    slots: Any
    offsets: Any
    starts: Any
    stops: Any
    last: Any
    samples: Any
    keys: Any
    tile_rows: Any
    tile_offsets: Any
    table_places: Any
    table_blocks: Any

    @classmethod
    def over(cls, packed: Any, shape: StepShape) -> StepInputs:
        """Return views of a packed int32 array or tensor of at least `packed_numbers(shape)` numbers."""
        views, begin = [], 0
        for size in _sizes(shape):
            views.append(packed[begin : begin + size])
            begin += _padded(size)
        names = list(cls.__slots__)[1:]
        fields = dict(zip(names, views, strict=True))
        fields["keys"] = fields["keys"].reshape(shape.rows, 2)
        return cls(shape, **fields)


def packed_numbers(shape: StepShape) -> int:
    """Return how many int32 the packed inputs of a step have."""
    return sum(_padded(size) for size in _sizes(shape))


def zeros(shape: StepShape, device: torch.device) -> StepInputs:
    """Return inputs on a device, all zero."""
    return StepInputs.over(torch.zeros(packed_numbers(shape), dtype=torch.int32, device=device), shape)


def _sizes(shape: StepShape) -> Iterator[int]:
    tokens, rows, tiles = shape.tokens, shape.rows, shape.tiles
    yield from (tokens, tokens, tokens, tokens)
    yield from (rows, rows + 1, rows, rows, rows, rows, 2 * rows)
    yield from (tiles, tiles)
    yield from (rows, rows)


def _padded(size: int) -> int:
    """Round up to 16 bytes, the alignment that kernels prefer."""
    return -(-size // 4) * 4
