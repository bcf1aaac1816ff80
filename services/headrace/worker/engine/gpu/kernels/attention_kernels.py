"""The kernels of attention; `attention` describes and launches them.

Names of lengths and indices count key tiles or keys; "lines" are the lines of a query tile, one per token and
query head. Scores are powers of 2, as the device computes these faster than those of e.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _cap(scores: tl.tensor, SCALE: tl.constexpr, SOFTCAP: tl.constexpr) -> tl.tensor:
    """Scale and bound products of queries and keys, for powers of 2 instead of e."""
    if SOFTCAP > 0.0:
        scores = scores * (SCALE / SOFTCAP)
        # tanh(x) = (1 - t) / (1 + t) with t = exp(-2 x), for positive x; this form cannot overflow.
        t = tl.exp2(tl.abs(scores) * (-2.0 * _LOG2_E))
        capped = (1.0 - t) / (1.0 + t) * (SOFTCAP * _LOG2_E)
        scores = tl.where(scores < 0, -capped, capped)
    else:
        scores = scores * (SCALE * _LOG2_E)
    return scores


@triton.jit
def _finite(highest: tl.tensor) -> tl.tensor:
    """Replace the maximum of no scores, so that differences from it are defined."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _weights(highest_a: tl.tensor, highest_b: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the common maximum of two softmaxes, and the factors of the sums of either."""
    highest = tl.maximum(highest_a, highest_b)
    return highest, tl.exp2(highest_a - _finite(highest)), tl.exp2(highest_b - _finite(highest))


@triton.jit
def _see_keys(
    queries: tl.tensor, highest: tl.tensor, total: tl.tensor, sums: tl.tensor,
    index: tl.tensor, length: tl.tensor, positions: tl.tensor, table: tl.tensor,
    key_pages: tl.tensor, value_pages: tl.tensor,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, KEY_TILE: tl.constexpr, MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add one key tile to a running softmax: its maximum, its total and its weighted sums of values.

    index    of the key tile
    length   keys of the row; others are stale and may not even be finite
    MASKED   whether some query of the tile does not attend to some key
    """
    keys = index * KEY_TILE + tl.arange(0, KEY_TILE)
    key_dims, value_dims = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    if MASKED:
        stored = keys < length
        blocks = tl.load(table + keys // BLOCK_TOKENS, mask=stored, other=0)
        key_mask = stored[None, :] & (key_dims < KEY_DIM)[:, None]
        value_mask = stored[:, None] & (value_dims < VALUE_DIM)[None, :]
    else:
        blocks = tl.load(table + keys // BLOCK_TOKENS)
        key_mask = (key_dims < KEY_DIM)[:, None]
        value_mask = (value_dims < VALUE_DIM)[None, :]
    places = blocks.to(tl.int64) * BLOCK_TOKENS + keys % BLOCK_TOKENS
    key_places = places[None, :] * (KV_HEADS * KEY_DIM) + key_dims[:, None]
    value_places = places[:, None] * (KV_HEADS * VALUE_DIM) + value_dims[None, :]
    key_tile = tl.load(key_pages + key_places, mask=key_mask, other=0.0)
    value_tile = tl.load(value_pages + value_places, mask=value_mask, other=0.0)

    scores = _cap(tl.dot(queries, key_tile, input_precision="ieee"), SCALE, SOFTCAP)
    if MASKED:
        visible = keys[None, :] <= positions[:, None]
        if WINDOW > 0:
            visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    known = _finite(new_highest)
    weights = tl.exp2(scores - known[:, None])
    factor = tl.exp2(highest - known)
    total = total * factor + tl.sum(weights, 1)
    sums = tl.dot(weights.to(value_tile.dtype), value_tile, sums * factor[:, None], input_precision="ieee")
    return new_highest, total, sums


@triton.jit(do_not_specialize=["table_width", "segments"])
def attend_tile(
    query: tl.tensor, key_pages: tl.tensor, value_pages: tl.tensor, tables: tl.tensor,
    slots: tl.tensor, offsets: tl.tensor, starts: tl.tensor, tile_rows: tl.tensor,
    tile_offsets: tl.tensor,
    out: tl.tensor, partials: tl.tensor,
    query_token: tl.tensor, query_head: tl.tensor, query_dim: tl.tensor, out_token: tl.tensor,
    out_head: tl.tensor, out_dim: tl.tensor, table_width: tl.tensor, segments: tl.tensor,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, LINES: tl.constexpr, KEY_TILE: tl.constexpr,
    SEGMENT_KEYS: tl.constexpr, SEGMENTED: tl.constexpr, SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    """Compute a query tile of one key head; the program's indices: both of these, share of the segments."""
    # The last tiles of a long row have the most keys, so they start first, in all heads: what remains for the
    # end are short ones. The heads of a tile start together, as their keys are neighbours in memory.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    row = tl.load(tile_rows + tile)
    if row < 0:
        return
    first_token = tl.load(tile_offsets + tile)
    first_position = tl.load(starts + row) + first_token - tl.load(offsets + row)
    count = tl.minimum(tl.load(offsets + row + 1) - first_token, TILE)
    length = first_position + count
    table = tables + tl.load(slots + row).to(tl.int64) * table_width

    lines = tl.arange(0, LINES)
    token_of, head_of = lines // GROUP, kv_head * GROUP + lines % GROUP
    used = token_of < count
    positions = first_position + token_of
    tokens = (first_token + token_of).to(tl.int64)
    key_dims, value_dims = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    queries = tl.load(
        query + (tokens * query_token + head_of * query_head)[:, None] + key_dims[None, :] * query_dim,
        mask=used[:, None] & (key_dims < KEY_DIM)[None, :],
        other=0.0,
    )
    own_keys, own_values = key_pages + kv_head * KEY_DIM, value_pages + kv_head * VALUE_DIM

    tiles_of_segment: tl.constexpr = SEGMENT_KEYS // KEY_TILE
    # Key tiles first_tile to end_tile - 1 have keys that a token of this tile attends to.
    end_tile = tl.cdiv(length, KEY_TILE)
    first_tile = 0
    if WINDOW > 0:
        first_tile = tl.maximum(first_position - WINDOW + 1, 0) // KEY_TILE

    highest = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    sums = tl.zeros([LINES, VALUE_WIDTH], tl.float32)

    if SPLIT:
        first_segment = first_tile // tiles_of_segment + tl.program_id(1)
        for segment in range(first_segment, tl.cdiv(end_tile, tiles_of_segment), tl.num_programs(1)):
            highest = tl.full([LINES], float("-inf"), tl.float32)
            total = tl.zeros([LINES], tl.float32)
            sums = tl.zeros([LINES, VALUE_WIDTH], tl.float32)
            begin = tl.maximum(segment * tiles_of_segment, first_tile)
            end = tl.minimum((segment + 1) * tiles_of_segment, end_tile)
            for index in range(begin, end):
                highest, total, sums = _see_keys(
                    queries, highest, total, sums,
                    index, length, positions, table, own_keys, own_values,
                    SCALE, SOFTCAP, WINDOW, KV_HEADS, KEY_DIM, VALUE_DIM, KEY_WIDTH, VALUE_WIDTH,
                    BLOCK_TOKENS, KEY_TILE, True,
                )  # fmt: skip
            place = ((tile * (KV_HEADS * GROUP) + head_of) * segments + segment) * (VALUE_DIM + 2)
            tl.store(
                partials + place[:, None] + value_dims[None, :],
                sums,
                mask=used[:, None] & (value_dims < VALUE_DIM)[None, :],
            )
            tl.store(partials + place + VALUE_DIM, highest, mask=used)
            tl.store(partials + place + (VALUE_DIM + 1), total, mask=used)
    elif SEGMENTED:
        all_highest = tl.full([LINES], float("-inf"), tl.float32)
        all_total = tl.zeros([LINES], tl.float32)
        all_sums = tl.zeros([LINES, VALUE_WIDTH], tl.float32)
        # One loop over all key tiles rather than two nested ones, so that loads run ahead across segments.
        for index in range(first_tile, end_tile):
            highest, total, sums = _see_keys(
                queries, highest, total, sums,
                index, length, positions, table, own_keys, own_values,
                SCALE, SOFTCAP, WINDOW, KV_HEADS, KEY_DIM, VALUE_DIM, KEY_WIDTH, VALUE_WIDTH,
                BLOCK_TOKENS, KEY_TILE, True,
            )  # fmt: skip
            if (index + 1) % tiles_of_segment == 0 or index + 1 == end_tile:
                all_highest, ours, other = _weights(all_highest, highest)
                all_total = all_total * ours + total * other
                all_sums = all_sums * ours[:, None] + sums * other[:, None]
                highest = tl.full([LINES], float("-inf"), tl.float32)
                total = tl.zeros([LINES], tl.float32)
                sums = tl.zeros([LINES, VALUE_WIDTH], tl.float32)
        total, sums = all_total, all_sums
    else:
        masked_tile = first_tile
        if WINDOW == 0:
            # Every token of the tile attends to all keys of these key tiles.
            masked_tile = (first_position + 1) // KEY_TILE
            for index in range(first_tile, masked_tile):
                highest, total, sums = _see_keys(
                    queries, highest, total, sums,
                    index, length, positions, table, own_keys, own_values,
                    SCALE, SOFTCAP, WINDOW, KV_HEADS, KEY_DIM, VALUE_DIM, KEY_WIDTH, VALUE_WIDTH,
                    BLOCK_TOKENS, KEY_TILE, False,
                )  # fmt: skip
        for index in range(masked_tile, end_tile):
            highest, total, sums = _see_keys(
                queries, highest, total, sums,
                index, length, positions, table, own_keys, own_values,
                SCALE, SOFTCAP, WINDOW, KV_HEADS, KEY_DIM, VALUE_DIM, KEY_WIDTH, VALUE_WIDTH,
                BLOCK_TOKENS, KEY_TILE, True,
            )  # fmt: skip

    if not SPLIT:
        # Unused lines may have no visible key at all.
        seen = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out + (tokens * out_token + head_of * out_head)[:, None] + value_dims[None, :] * out_dim,
            seen.to(out.dtype.element_ty),
            mask=used[:, None] & (value_dims < VALUE_DIM)[None, :],
        )


@triton.jit(do_not_specialize=["segments"])
def merge_segments(
    partials: tl.tensor, starts: tl.tensor, offsets: tl.tensor, tile_rows: tl.tensor,
    tile_offsets: tl.tensor,
    out: tl.tensor, out_token: tl.tensor, out_head: tl.tensor, out_dim: tl.tensor,
    segments: tl.tensor,
    WINDOW: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    SEGMENT_KEYS: tl.constexpr, AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """Merge the segments of one token and query head, in ascending order."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tile_rows + tile)
    if row < 0:
        return
    token = tl.load(tile_offsets + tile)
    position = tl.load(starts + row) + token - tl.load(offsets + row)
    first_segment = 0
    if WINDOW > 0:
        first_segment = tl.maximum(position - WINDOW + 1, 0) // SEGMENT_KEYS
    end_segment = position // SEGMENT_KEYS + 1
    dims = tl.arange(0, VALUE_WIDTH)
    own = partials + (tile * tl.num_programs(1) + head) * segments * (VALUE_DIM + 2)
    highest, total = float("-inf"), 0.0
    sums = tl.zeros([VALUE_WIDTH], tl.float32)
    for begin in range(first_segment, end_segment, AT_ONCE):
        # Unrolled, so that these loads are in flight together. Segments after the last change nothing.
        for ahead in tl.static_range(AT_ONCE):
            segment = own + (begin + ahead) * (VALUE_DIM + 2)
            exists = begin + ahead < end_segment
            exist = dims < tl.where(exists, VALUE_DIM, 0)
            segment_highest = tl.load(segment + VALUE_DIM, mask=exists, other=float("-inf"))
            segment_total = tl.load(segment + (VALUE_DIM + 1), mask=exists, other=0.0)
            segment_sums = tl.load(segment + dims, mask=exist, other=0.0)
            highest, ours, other = _weights(highest, segment_highest)
            total = total * ours + segment_total * other
            sums = sums * ours + segment_sums * other
    seen = sums / total
    where = token.to(tl.int64) * out_token + head * out_head
    tl.store(out + where + dims * out_dim, seen.to(out.dtype.element_ty), mask=dims < VALUE_DIM)
