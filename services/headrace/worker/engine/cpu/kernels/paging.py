"""Paged memory for keys and values on the CPU, and attention over it for models of any make.

`torch_engine` calls `attend` from inside transformers' own layers; `forward` uses the same kernels without
leaving compiled code.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, cfunc, types

from headrace.worker.engine.cpu.kernels import attend as attention
from headrace.worker.engine.cpu.kernels import machine, team
from headrace.worker.engine.cpu.kernels.attend import BLOCK, LAYER, RAGGED

Ints = npt.NDArray[np.int32]

_LINE = 64  # bytes in a cache line


class PagedMemory:
    """Keys and values of all layers in blocks of `BLOCK` tokens.

    blocks   how many each layer has
    half     bfloat16 if true, float32 otherwise

    A layer's memory is made when its shape is first told. It is zero pages that the system commits when
    they are written: memory grows with use, up to blocks x block_bytes.
    """

    def __init__(self, blocks: int, *, half: bool) -> None:
        self.blocks = blocks
        self.half = half
        self._layers: dict[int, npt.NDArray[Any]] = {}
        self._owned: list[npt.NDArray[Any]] = []

    def layer(
        self, index: int, *, heads: int, kv_heads: int, head_dim: int, value_dim: int, scale: float,
        softcap: float = 0.0, window: int = 0,
    ) -> npt.NDArray[Any]:  # fmt: skip
        """Return what kernels need to know of a layer, one record of type LAYER.

        scale     multiplies the products of queries and keys
        softcap   bounds those products by softcap x tanh(product / softcap); 0 for none
        window    a token sees itself and the window - 1 tokens before it; 0 for all
        """
        made = self._layers.get(index)
        if made is None:
            stored = -(-value_dim // 16) * 16
            made = np.zeros(1, LAYER)
            made["keys"] = self._take(self.blocks * kv_heads * (head_dim + head_dim % 2) * BLOCK)
            made["values"] = self._take(self.blocks * kv_heads * BLOCK * stored)
            made["blocks"] = self.blocks
            made["half"], made["kv_heads"], made["head_dim"] = self.half, kv_heads, head_dim
            made["value_dim"] = stored
            self._layers[index] = made
        made["heads"], made["scale"], made["softcap"], made["window"] = heads, scale, softcap, window
        return made

    def told(self, index: int) -> npt.NDArray[Any]:
        """Return the record of a layer that `layer` has made."""
        return self._layers[index]

    @property
    def block_bytes(self) -> int:
        """What one block takes in all layers together, in bytes; known once every layer was told."""
        size = 2 if self.half else 4
        return sum(
            int(made["kv_heads"][0])
            * BLOCK
            * int(made["head_dim"][0] + made["head_dim"][0] % 2 + made["value_dim"][0])
            * size
            for made in self._layers.values()
        )

    def _take(self, elements: int) -> int:
        # numpy's zeros ask for huge pages: 2 MiB would be committed for a sequence's first token in every
        # layer's keys and values.
        memory = mmap.mmap(-1, max(elements * (2 if self.half else 4), 1))
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        held = np.frombuffer(memory, np.uint8)
        self._owned.append(held)
        return int(held.ctypes.data)


class Ragged:
    """Which tokens a step computes: rows of different sequences, one after the other.

    starts   position of each row's first token
    counts   tokens of each row, at least 1
    tables   each row's block table, covering its last token
    """

    def __init__(
        self,
        starts: Sequence[int] | Ints,
        counts: Sequence[int] | Ints,
        tables: Sequence[Sequence[int]] | Ints,
    ) -> None:
        begins = np.asarray(starts, np.int32)
        self.counts = np.asarray(counts, np.int32)
        self.tokens = int(self.counts.sum())
        self.token_rows = np.repeat(np.arange(len(begins), dtype=np.int32), self.counts)
        self.firsts = np.cumsum(self.counts, dtype=np.int32) - self.counts
        within = np.arange(self.tokens, dtype=np.int32) - np.repeat(self.firsts, self.counts)
        self.positions = np.repeat(begins, self.counts) + within
        needed = (begins + self.counts + (BLOCK - 1)) // BLOCK
        self.blocks: Ints = np.zeros((len(begins), int(needed.max())), np.int32)
        for row, (table, length) in enumerate(zip(tables, needed.tolist(), strict=True)):
            self.blocks[row, :length] = table[:length]
        self._made: dict[int, tuple[Ints, npt.NDArray[Any]]] = {}

    def record(self, tile_tokens: int) -> npt.NDArray[Any]:
        """Return the step for kernels, cut into tiles of at most *tile_tokens* tokens: a RAGGED record."""
        made = self._made.get(tile_tokens)
        if made is None:
            tiles = self._tiles(tile_tokens)
            record = np.zeros(1, RAGGED)
            record["tokens"], record["tiles"] = self.tokens, len(tiles)
            record["tile_table"], record["positions"] = tiles.ctypes.data, self.positions.ctypes.data
            record["token_rows"], record["blocks"] = self.token_rows.ctypes.data, self.blocks.ctypes.data
            record["table_width"] = self.blocks.shape[1]
            made = self._made[tile_tokens] = tiles, record
        return made[1]

    def _tiles(self, tile_tokens: int) -> Ints:
        many = (self.counts + (tile_tokens - 1)) // tile_tokens
        rows = np.repeat(np.arange(len(many), dtype=np.int32), many)
        index = np.arange(len(rows), dtype=np.int32) - np.repeat(np.cumsum(many) - many, many)
        begins = index * tile_tokens
        tiles = np.empty((len(rows), 3), np.int32)
        tiles[:, 0] = rows
        tiles[:, 1] = self.firsts[rows] + begins
        tiles[:, 2] = np.minimum(self.counts[rows] - begins, tile_tokens)
        return tiles


_CALL = np.dtype(
    [
        ("layer", LAYER),
        ("ragged", RAGGED),
        ("queries", np.int64),
        ("keys", np.int64),
        ("values", np.int64),
        ("value_dim", np.int64),
        ("out", np.int64),
        ("scratch", np.int64),
        ("scratch_bytes", np.int64),
        ("counter", np.int64),
        ("watch", np.int64),  # of `team.Watch`
    ]
)


@machine.compiled
def _attend(call: Any) -> None:
    layer, ragged = call.layer, call.ragged
    me, threads = team.thread_number(), team.thread_count()
    key_row = 4 * layer.kv_heads * layer.head_dim
    value_row = 4 * layer.kv_heads * call.value_dim
    for token in range(me * ragged.tokens // threads, (me + 1) * ragged.tokens // threads):
        attention.store_token(
            call.watch,
            layer,
            ragged,
            token,
            call.keys + token * key_row,
            call.values + token * value_row,
            call.value_dim,
        )
    team.barrier(call.watch)
    scratch = call.scratch + me * call.scratch_bytes
    query_row, out_row = 4 * layer.heads * layer.head_dim, 4 * layer.heads * layer.value_dim
    while True:
        unit = team.claim(call.counter)
        if unit >= attention.units(layer, ragged):
            break
        attention.attend_unit(
            call.watch, layer, ragged, unit, call.queries, query_row, call.out, out_row, scratch
        )


@functools.cache
def compiled() -> Any:
    """Return what the threads call; compiles it, or reads it from the cache, the first time."""
    return cfunc(types.void(types.voidptr), nopython=True, cache=True)(_attend_on_thread)


def _attend_on_thread(data: Any) -> None:
    call = carray(data, (1,), _CALL)[0]
    try:
        _attend(call)
    except Exception:
        team.fail(call.watch)
    team.finish(call.watch)


def attend(
    layer: npt.NDArray[Any], ragged: Ragged, queries: int, keys: int, values: int, *, value_dim: int,
    out: int, threads: int,
) -> None:  # fmt: skip
    """Store a step's keys and values in a layer's memory, and attend.

    layer     from `PagedMemory.layer`
    queries   address of [tokens, heads, head_dim] float32, contiguous
    keys      address of [tokens, kv_heads, head_dim] float32
    values    address of [tokens, kv_heads, value_dim] float32
    out       address of [tokens, heads, value_dim rounded up to 16] float32, to be written
    """
    heads, kv_heads, head_dim, stored = (
        int(layer[name][0]) for name in ("heads", "kv_heads", "head_dim", "value_dim")
    )
    call = np.zeros(1, _CALL)
    size = -(-attention.scratch_bytes(head_dim, stored) // _LINE) * _LINE
    scratch = np.empty(threads * size, np.uint8)
    counter = np.zeros(1, np.int64)
    call["layer"], call["ragged"] = layer, ragged.record(attention.tile_tokens(heads, kv_heads))
    call["queries"], call["keys"], call["values"] = queries, keys, values
    call["value_dim"], call["out"] = value_dim, out
    call["scratch"], call["scratch_bytes"] = scratch.ctypes.data, size
    call["counter"] = counter.ctypes.data
    watch = team.Watch(threads)
    call["watch"] = watch.address
    team.run(compiled(), call.ctypes.data, threads, watch)
