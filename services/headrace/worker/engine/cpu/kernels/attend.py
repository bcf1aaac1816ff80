"""Attention over paged keys and values: any number of sequences, prefill chunks and decodes, in one call.

With bfloat16 memory, queries and weights are rounded to bfloat16 too; sums are float32.

Queries are grouped in tiles, which share the keys that they read. A tile passes over the blocks of its
sequence and keeps a running softmax (`softmax`). Blocks are at fixed positions of a sequence, and the
arithmetic of a block does not depend on the rest of the tile. So the result of a token is bit-identical in
a chunk and in a decode. Keys after the position of a query are read only for later queries of its tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels import team
from headrace.worker.engine.cpu.kernels.block_products import (
    KEY_TILE,
    MAX_QUERY_ROWS,
    score_full,
    score_half,
    weigh_full,
    weigh_full_last,
    weigh_half,
    weigh_half_last,
)
from headrace.worker.engine.cpu.kernels.elementwise import pointer
from headrace.worker.engine.cpu.kernels.kv_layout import BLOCK, to_bfloat16
from headrace.worker.engine.cpu.kernels.softmax import (
    DECAYS,
    PARTIAL_BYTES,
    STATE_BYTES,
    TOGETHER,
    TOTALS,
    add_totals,
    highest,
    raise_maxima,
    weigh_scores_full,
    weigh_scores_half,
)

# How many blocks ahead of the computation memory is prefetched. The prefetcher of the CPU
# cannot: each block is somewhere else.
_AHEAD = KEY_TILE // BLOCK


def scratch_bytes(head_dim: int, value_dim: int) -> int:
    """Return how many bytes of scratch memory one thread needs."""
    rows = MAX_QUERY_ROWS * (head_dim + KEY_TILE + value_dim) * 4
    return rows + STATE_BYTES + PARTIAL_BYTES + 2 * 8 * _AHEAD


@m.jit
def _first_key(layer: Any, ragged: Any, tile: int) -> int:
    """Return the position of the first key that a tile reads."""
    if layer.window == 0:
        return 0
    table = carray(pointer(ragged.tile_table), (ragged.tiles, 3), np.int32)
    positions = carray(pointer(ragged.positions), (ragged.tokens,), np.int32)
    return int(max(0, positions[table[tile, 1]] - layer.window + 1) // KEY_TILE * KEY_TILE)


@m.jit
def attend_tile(
    failures: int, layer: Any, ragged: Any, tile: int, kv_head: int, head: int, group: int, next_tile: int,
    next_kv_head: int, queries: int, query_row: int, out: int, out_row: int, scratch: int,
) -> None:  # fmt: skip
    """Compute attention between the queries of one tile and one KV head, and prefetch memory for the next.

    failures    address of a `team.FailureState`, as in all functions here
    tile        index into the tile table
    head        the first of *group* heads, which share the KV head; tokens of the tile x *group* are at
                most MAX_QUERY_ROWS
    next_tile   the tile that this thread computes next, with next_kv_head
    queries     address of [tokens, heads, head_dim] float32 of the step; query_row bytes per token
    out         the same for [tokens, heads, value_dim as stored]
    scratch     address of `scratch_bytes` bytes that only this thread uses
    """
    table = carray(pointer(ragged.tile_table), (ragged.tiles, 3), np.int32)
    row, begin, count = table[tile, 0], table[tile, 1], table[tile, 2]
    positions = carray(pointer(ragged.positions), (ragged.tokens,), np.int32)
    blocks = carray(pointer(ragged.blocks + 4 * ragged.table_width * row), (ragged.table_width,), np.int32)
    dim, wide = layer.head_dim, layer.value_dim
    rows = count * group
    own = scratch
    scores = own + 4 * MAX_QUERY_ROWS * dim
    sums = scores + 4 * MAX_QUERY_ROWS * KEY_TILE
    states = sums + 4 * MAX_QUERY_ROWS * wide
    partials = states + STATE_BYTES
    words = (dim + 1) // 2 if layer.half else dim
    maxima = carray(pointer(states), (m.LANES,), np.float32)
    totals = carray(pointer(states + TOTALS), (m.LANES,), np.float32)
    for r in range(m.LANES):
        maxima[r], totals[r] = -1e30, 0.0
    total = carray(pointer(sums), (MAX_QUERY_ROWS, wide), np.float32)
    for r in range(rows):
        source = queries + query_row * (begin + r // group) + 4 * dim * (head + r % group)
        query = carray(pointer(source), (dim,), np.float32)
        if layer.half:
            rounded = carray(pointer(own + 4 * words * r), (2 * words,), np.uint16)
            rounded[2 * words - 1] = 0
            for d in range(dim):
                rounded[d] = to_bfloat16(query[d] * layer.scale)
        else:
            scaled = carray(pointer(own + 4 * words * r), (dim,), np.float32)
            for d in range(dim):
                scaled[d] = query[d] * layer.scale
        for d in range(wide):
            total[r, d] = 0.0
    last = positions[begin + count - 1]
    first, stop = _first_key(layer, ragged, tile), last // BLOCK + 1
    next_row = ragged.blocks + 4 * ragged.table_width * table[next_tile, 0]
    next_blocks = carray(pointer(next_row), (ragged.table_width,), np.int32)
    next_first = _first_key(layer, ragged, next_tile) // BLOCK
    next_last = positions[table[next_tile, 1] + table[next_tile, 2] - 1] // BLOCK
    distance = min(_AHEAD, stop - first // BLOCK)
    key_block = 128 * words
    value_block = (2 if layer.half else 4) * BLOCK * wide
    value_places = partials + PARTIAL_BYTES
    next_places = value_places + 8 * _AHEAD
    values = carray(pointer(value_places), (_AHEAD,), np.int64)
    next_values = carray(pointer(next_places), (_AHEAD,), np.int64)
    for start in range(first, last + 1, KEY_TILE):
        begins = start // BLOCK
        many = min(KEY_TILE // BLOCK, stop - begins)
        for i in range(many):
            if m.CHECKED:
                team.require(failures, team.KV_BLOCK, blocks[begins + i], layer.blocks)
            block = np.int64(blocks[begins + i]) * layer.kv_heads + kv_head
            keys = layer.keys + block * key_block
            coming = begins + i + distance
            if coming < stop:
                next_block = np.int64(blocks[coming]) * layer.kv_heads + kv_head
            else:
                coming = min(next_first + coming - stop, next_last)
                next_block = np.int64(next_blocks[coming]) * layer.kv_heads + next_kv_head
            values[i] = layer.values + block * value_block
            next_values[i] = layer.values + next_block * value_block
            ahead = layer.keys + next_block * key_block
            if layer.half:
                score_half(rows, own, keys, words, scores + 4 * BLOCK * i, ahead)
            else:
                score_full(rows, own, keys, words, scores + 4 * BLOCK * i, ahead)
        vectors = (many * (BLOCK // m.LANES) + TOGETHER - 1) // TOGETHER * TOGETHER
        for r in range(rows):
            position = positions[begin + r // group]
            end = min(max(position + 1 - start, 0), KEY_TILE)
            lowest = 0
            if layer.window > 0:
                lowest = max(position - layer.window + 1 - start, 0)
            highest(scores + 4 * KEY_TILE * r, vectors, lowest, end, layer.softcap, partials + 64 * r)
        raise_maxima(rows, partials, states)
        if layer.half:
            weigh_scores_half(rows, scores, 4 * KEY_TILE, vectors, partials, states)
        else:
            weigh_scores_full(rows, scores, 4 * KEY_TILE, vectors, partials, states)
        add_totals(rows, partials, states)
        visible, decays = min(last + 1 - start, KEY_TILE), states + DECAYS
        for column in range(0, wide, 32):
            at, sum_ = 4 * column, sums + 4 * column
            if layer.half:
                if column + 32 <= wide:
                    weigh_half(rows, scores, visible, value_places, at, wide, sum_, decays, next_places)
                else:
                    weigh_half_last(rows, scores, visible, value_places, at, wide, sum_, decays, next_places)
            elif column + 32 <= wide:
                weigh_full(rows, scores, visible, value_places, at, wide, sum_, decays, next_places)
            else:
                weigh_full_last(rows, scores, visible, value_places, at, wide, sum_, decays, next_places)
    for r in range(rows):
        place = out + out_row * (begin + r // group) + 4 * wide * (head + r % group)
        result = carray(pointer(place), (wide,), np.float32)
        share = np.float32(1.0) / totals[r]
        for d in range(wide):
            result[d] = total[r, d] * share


@m.jit
def attend_unit(
    failures: int,
    layer: Any,
    ragged: Any,
    unit: int,
    following: int,
    queries: int,
    query_row: int,
    out: int,
    out_row: int,
    scratch: int,
) -> None:
    """Compute one of the `work_units` of the step, and prefetch for the *following* one, if there is one.

    See `attend_tile`.
    """
    group = layer.heads // layer.kv_heads
    parts = (group + MAX_QUERY_ROWS - 1) // MAX_QUERY_ROWS
    size = (group + parts - 1) // parts
    per_tile = layer.kv_heads * parts
    tile, kv_head, part = unit // per_tile, unit % per_tile // parts, unit % parts
    next_tile, next_kv_head = min(following // per_tile, ragged.tiles - 1), following % per_tile // parts
    head = kv_head * group + part * size
    heads = min(size, group - part * size)
    attend_tile(
        failures, layer, ragged, tile, kv_head, head, heads, next_tile, next_kv_head, queries, query_row, out,
        out_row, scratch,
    )  # fmt: skip


@m.jit
def work_units(layer: Any, ragged: Any) -> Any:
    """Return the number of work items of the attention of a step."""
    group = layer.heads // layer.kv_heads
    return ragged.tiles * layer.kv_heads * ((group + MAX_QUERY_ROWS - 1) // MAX_QUERY_ROWS)


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Return the most tokens of one sequence in a tile."""
    return max(1, MAX_QUERY_ROWS // (heads // kv_heads))
