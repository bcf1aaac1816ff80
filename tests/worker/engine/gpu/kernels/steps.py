"""Device steps over paged memory with known contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headrace.worker.engine import plain_attention
from headrace.worker.engine.gpu.step_inputs import UNUSED, StepInputs, StepShape, zeros
from headrace.worker.engine.kv_memory import LayerShape, PagedMemory
from headrace.worker.engine.transformers_attention import LayerAttention, Masking
from tests.worker.engine.gpu.device import DEVICE

BLOCK_TOKENS = 32
_MOST = 600  # positions of a row


@dataclass(frozen=True)
class Row:
    """Tokens start to stop - 1 of a sequence; sequences of equal *seed* have equal numbers."""

    start: int
    stop: int
    seed: int = 0

    def numbers(self, purpose: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Return random numbers for positions 0 to stop - 1: [stop, heads, dim]."""
        # Always as many, as the numbers that a generator returns depend on how many are requested.
        generator = torch.Generator().manual_seed(1000 * self.seed + purpose)
        return torch.randn(_MOST, heads, dim, generator=generator)[: self.stop].to(DEVICE, dtype)


class Step:
    """A step over paged memory that is not a number wherever no row has a key or value.

    tile      tokens of a query tile
    padding   padding tokens, and padding rows, at the end of the step
    layer     heads and dimensions; its masking is of no effect
    """

    def __init__(
        self,
        rows: Sequence[Row],
        layer: LayerAttention,
        *,
        tile: int = 1,
        padding: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rows, self.layer = rows, layer
        shape = layer.shape
        counts = [row.stop - row.start for row in rows]
        tokens = sum(counts)
        self.inputs = zeros(StepShape(tokens + padding, len(rows) + padding, tile), DEVICE)
        width = max(-(-row.stop // BLOCK_TOKENS) for row in rows)
        blocks = len(rows) * width + 1
        self.memory = PagedMemory(
            {0: shape}, blocks=blocks, block_tokens=BLOCK_TOKENS, device=DEVICE, dtype=dtype
        )
        for pages in self.memory[0]:
            pages.fill_(float("nan"))
        self.tables = torch.full((len(rows) + 1, width), blocks - 1, dtype=torch.int32, device=DEVICE)
        order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
        self.query = torch.full(
            (tokens + padding, layer.heads, shape.key_dim), float("nan"), dtype=dtype, device=DEVICE
        )
        self.keys, self.values, queries = [], [], []
        for slot, row in enumerate(rows):
            # Slots are in another order than rows.
            self.tables[len(rows) - 1 - slot] = order[slot * width : (slot + 1) * width]
            queries.append(row.numbers(0, layer.heads, shape.key_dim, dtype)[row.start :])
            self.keys.append(row.numbers(1, shape.kv_heads, shape.key_dim, dtype))
            self.values.append(row.numbers(2, shape.kv_heads, shape.value_dim, dtype))
        self.query[:tokens] = torch.cat(queries)
        _fill(self.inputs, rows, counts, self.tables)
        for index in range(len(rows)):
            self.store(index, 0, rows[index].stop)

    def store(self, row: int, start: int, stop: int) -> None:
        """Write keys and values of a row's positions."""
        places = torch.tensor(self.places(row, start, stop), device=DEVICE)
        self.memory.store(0, places, self.keys[row][start:stop], self.values[row][start:stop])

    def places(self, row: int, start: int, stop: int) -> list[int]:
        """Return where the keys of a row's positions are stored."""
        table = self.tables[len(self.rows) - 1 - row].tolist()
        return [table[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS for at in range(start, stop)]

    def expected(self, masking: Masking) -> torch.Tensor:
        """Compute the attention of all tokens but padding in float32."""
        parts, begin = [], 0
        for row, keys, values in zip(self.rows, self.keys, self.values, strict=True):
            own = self.query[begin : begin + row.stop - row.start].float()
            parts.append(plain_attention.attend(own, keys.float(), values.float(), row.start, masking))
            begin += len(own)
        return torch.cat(parts)


def _fill(inputs: StepInputs, rows: Sequence[Row], counts: Sequence[int], tables: torch.Tensor) -> None:
    tokens, tile, last_slot = sum(counts), 0, len(tables) - 1
    inputs.slots.fill_(last_slot)
    inputs.offsets.fill_(tokens)
    inputs.tile_rows.fill_(UNUSED)
    begin = 0
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        inputs.slots[index] = len(rows) - 1 - index
        inputs.offsets[index] = begin
        inputs.starts[index], inputs.stops[index] = row.start, row.stop
        for first in range(0, count, inputs.shape.tile):
            inputs.tile_rows[tile], inputs.tile_offsets[tile] = index, begin + first
            tile += 1
        begin += count


def layer_of(heads: int, kv_heads: int, key_dim: int, value_dim: int | None = None) -> LayerAttention:
    """Return a layer of these heads, with values like keys by default."""
    return LayerAttention(LayerShape(kv_heads, key_dim, value_dim or key_dim), heads, Masking(key_dim**-0.5))
