"""Paged memory for keys and values in the layout of the CPU kernels, and one layer's attention over it.

`kernel_attention` calls `store_and_attend` from inside the layers of transformers. `decoder_step` calls the
same kernels from compiled code.
"""

from __future__ import annotations

import functools
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from headrace.worker.engine.cpu.kernels import machine, team
from headrace.worker.engine.cpu.kernels.attend import attend_unit, scratch_bytes, work_units
from headrace.worker.engine.cpu.kernels.cache import compile_entry_point
from headrace.worker.engine.cpu.kernels.kv_layout import BLOCK, LAYER, RAGGED, store_token
from headrace.worker.engine.flat_step import FlatStep

Ints = npt.NDArray[np.int32]


class KernelMemory:
    """Keys and values of all layers in blocks of `BLOCK` tokens, laid out for the kernels.

    blocks   blocks of each layer
    half     bfloat16 if true, float32 otherwise

    The memory of a layer is mapped when `configure_layer` is first called for it. The system commits pages
    when they are written: memory grows with use, up to blocks x block_bytes.
    """

    def __init__(self, blocks: int, *, half: bool) -> None:
        self.blocks = blocks
        self.half = half
        self._layers: dict[int, npt.NDArray[Any]] = {}
        self._owned: list[npt.NDArray[Any]] = []

    def configure_layer(
        self, index: int, *, heads: int, kv_heads: int, head_dim: int, value_dim: int, scale: float,
        softcap: float = 0.0, window: int = 0,
    ) -> npt.NDArray[Any]:  # fmt: skip
        """Set the shape and parameters of a layer, and return its LAYER record.

        scale     factor of the products of queries and keys
        softcap   bounds those products by softcap x tanh(product / softcap); 0 for none
        window    a token attends to itself and the window - 1 tokens before it; 0 for all
        """
        record = self._layers.get(index)
        if record is None:
            stored = -(-value_dim // 16) * 16
            record = np.zeros(1, LAYER)
            record["keys"] = self._map(self.blocks * kv_heads * (head_dim + head_dim % 2) * BLOCK)
            record["values"] = self._map(self.blocks * kv_heads * BLOCK * stored)
            record["blocks"] = self.blocks
            record["half"], record["kv_heads"], record["head_dim"] = self.half, kv_heads, head_dim
            record["value_dim"] = stored
            self._layers[index] = record
        record["heads"], record["scale"], record["softcap"], record["window"] = heads, scale, softcap, window
        return record

    def record(self, index: int) -> npt.NDArray[Any]:
        """Return the LAYER record of a configured layer."""
        return self._layers[index]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers together; valid once every layer is configured."""
        size = 2 if self.half else 4
        return sum(
            int(record["kv_heads"][0])
            * BLOCK
            * int(record["head_dim"][0] + record["head_dim"][0] % 2 + record["value_dim"][0])
            * size
            for record in self._layers.values()
        )

    def _map(self, elements: int) -> int:
        # numpy.zeros requests huge pages: the first token of a sequence would commit 2 MiB for the keys and
        # values of every layer.
        memory = mmap.mmap(-1, max(elements * (2 if self.half else 4), 1))
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        held = np.frombuffer(memory, np.uint8)
        self._owned.append(held)
        return machine.address(held)


class Ragged:
    """A step as the kernels read it: the tokens that it computes, as consecutive rows of sequences.

    tile_tokens   the tokens of a row are divided into tiles of at most so many

    record   the RAGGED record; its addresses are valid while this object is
    """

    def __init__(self, flat: FlatStep, tile_tokens: int) -> None:
        decodes, tables = flat.tokens == flat.rows, flat.tables
        positions = flat.starts if decodes else flat.positions.astype(np.int32)
        tiles = _single_tokens(flat) if decodes else _tiles(flat, tile_tokens)
        self._owned = positions, flat.row_of, tables, tiles
        self.record = np.array(
            (
                flat.tokens,
                len(tiles),
                machine.address(tiles),
                machine.address(positions),
                machine.address(flat.row_of),
                machine.address(tables),
                tables.shape[1],
            ),
            RAGGED,
        )


def _single_tokens(flat: FlatStep) -> Ints:
    """Return `_tiles` of a step whose rows have one token each."""
    tiles = np.ones((flat.rows, 3), np.int32)
    tiles[:, 0] = tiles[:, 1] = flat.row_of
    return tiles


def _tiles(flat: FlatStep, tile_tokens: int) -> Ints:
    """Return the tiles [tiles, 3]: row, first token and number of tokens."""
    counts, firsts = np.diff(flat.offsets), flat.offsets[:-1]
    per_row = (counts + (tile_tokens - 1)) // tile_tokens
    rows = np.repeat(np.arange(len(per_row), dtype=np.int32), per_row)
    index = np.arange(len(rows), dtype=np.int32) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    begins = index * tile_tokens
    tiles = np.empty((len(rows), 3), np.int32)
    tiles[:, 0] = rows
    tiles[:, 1] = firsts[rows] + begins
    tiles[:, 2] = np.minimum(counts[rows] - begins, tile_tokens)
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
        ("failures", np.int64),  # address of a `team.FailureState`
    ]
)


@machine.jit
def _attend(call: Any) -> None:
    layer, ragged = call.layer, call.ragged
    me, threads = team.thread_number(), team.thread_count()
    key_row = 4 * layer.kv_heads * layer.head_dim
    value_row = 4 * layer.kv_heads * call.value_dim
    for token in range(me * ragged.tokens // threads, (me + 1) * ragged.tokens // threads):
        store_token(
            call.failures,
            layer,
            ragged,
            token,
            call.keys + token * key_row,
            call.values + token * value_row,
            call.value_dim,
        )
    team.barrier(call.failures)
    scratch = call.scratch + me * call.scratch_bytes
    query_row, out_row = 4 * layer.heads * layer.head_dim, 4 * layer.heads * layer.value_dim
    unit = team.claim(call.counter)
    while unit < work_units(layer, ragged):
        following = team.claim(call.counter)
        attend_unit(
            call.failures, layer, ragged, unit, following, call.queries, query_row, call.out, out_row, scratch
        )
        unit = following


@functools.cache
def attention_entry_point() -> Any:
    """Return the function that threads call; the first call compiles it or reads it from the cache."""
    return compile_entry_point(attend_on_thread)


def attend_on_thread(data: Any) -> None:
    """Compute the share of one thread of the attention at address *data*."""
    call = carray(data, (1,), _CALL)[0]
    try:
        _attend(call)
    except Exception:
        team.fail(call.failures)
    team.finish(call.failures)


def store_and_attend(
    layer: npt.NDArray[Any], ragged: Ragged, queries: int, keys: int, values: int, *, value_dim: int,
    out: int, threads: int,
) -> None:  # fmt: skip
    """Store the keys and values of a step in the memory of a layer, and compute its attention.

    layer     from `KernelMemory.configure_layer`
    ragged    with the layer's `tile_tokens`
    queries   address of [tokens, heads, head_dim] float32, contiguous
    keys      address of [tokens, kv_heads, head_dim] float32
    values    address of [tokens, kv_heads, value_dim] float32
    out       address of [tokens, heads, value_dim rounded up to 16] float32; receives the result
    """
    head_dim, stored = int(layer["head_dim"][0]), int(layer["value_dim"][0])
    call = np.zeros(1, _CALL)
    size = -(-scratch_bytes(head_dim, stored) // team.CACHE_LINE) * team.CACHE_LINE
    scratch = np.empty(threads * size, np.uint8)
    counter = np.zeros(1, np.int64)
    call["layer"], call["ragged"] = layer, ragged.record
    call["queries"], call["keys"], call["values"] = queries, keys, values
    call["value_dim"], call["out"] = value_dim, out
    call["scratch"], call["scratch_bytes"] = machine.address(scratch), size
    call["counter"] = machine.address(counter)
    failures = team.FailureState(threads)
    call["failures"] = failures.address
    team.run(attention_entry_point(), machine.address(call), threads, failures)
