"""Attend over paged keys and values: any number of sequences, prompt chunks and decodes alike, in one call.

Memory is cut into blocks of 32 tokens, which sequences hold through block tables (Kwon et al.,
PagedAttention, SOSP 2023). In a block, each KV head's keys lie transposed, so that a query meets 16 keys
with one instruction, and its values as they come. Numbers go in words of 4 bytes, as in `matmul`: one
float32, or two bfloat16 that are multiplied and added together, of neighbouring dimensions or tokens:

    keys    [blocks, kv_heads, head_dim, 32] float32, or [blocks, kv_heads, head_dim / 2, 32, 2] bfloat16
    values  [blocks, kv_heads, 32, value_dim] float32, or [blocks, kv_heads, 16, value_dim, 2] bfloat16

With bfloat16 memory, queries and weights are rounded to bfloat16 too; sums are float32.

Queries go block by block with a running maximum and sum (Milakov & Gimelshein, Online normalizer
calculation for softmax, 2018; FlashAttention's loop). Blocks lie at fixed positions of a sequence and a
block's arithmetic does not depend on who else is in the tile, so a token's result has the same bits in a
chunk and in a decode. Nothing past a query's own position is looked at but by later queries of its tile.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels import team
from headrace.worker.engine.cpu.kernels.elementwise import load_float, pointer, store_float
from headrace.worker.engine.cpu.kernels.machine import integer, offset

BLOCK = 2 * m.LANES  # tokens
STRETCH = 4 * BLOCK  # keys between two looks at the running maximum
MOST_QUERIES = 12  # rows of a tile: queries times heads of a group

_i8, _f4 = types.int64, types.float32

# One layer's memory and how it attends.
LAYER = np.dtype(
    [
        ("keys", np.int64),  # addresses
        ("values", np.int64),
        ("blocks", np.int64),  # how many
        ("half", np.int64),  # 1 for bfloat16, 0 for float32
        ("heads", np.int64),
        ("kv_heads", np.int64),
        ("head_dim", np.int64),
        ("value_dim", np.int64),  # as stored: a multiple of 16
        ("window", np.int64),  # tokens that a token sees, itself included; 0 for all
        ("scale", np.float32),
        ("softcap", np.float32),  # 0 for none
    ]
)

# What is attended: which tokens the step computes, and where their sequences' memory is.
RAGGED = np.dtype(
    [
        ("tokens", np.int64),
        ("tiles", np.int64),  # how many
        ("tile_table", np.int64),  # address of [tiles, 3] int32: row, first token, tokens
        ("positions", np.int64),  # address of [tokens] int32
        ("token_rows", np.int64),  # address of [tokens] int32
        ("blocks", np.int64),  # address of [rows, table_width] int32
        ("table_width", np.int64),
    ]
)


def _multiply(b: Any, half: bool, acc: Any, own: Any, words: Any) -> Any:
    """Add to 16 sums the products of one word, in every lane of *own*, with 16 words."""
    if half:
        return m.dot_bf16(b, acc, own, words)
    return m.fma(b, b.bitcast(own, m.FLOATS), b.bitcast(words, m.FLOATS), acc)


def _prefetch(b: Any, address: Any, index: Any) -> None:
    """Ask for the 128 bytes that are a word of 32 keys, or of 32 columns of values."""
    for line in (0, 64):
        m.prefetch(b, b.add(offset(b, address, index, 128), integer(line)))


def _scores(rows: int, half: bool) -> Any:
    """Make the kernel that multiplies *rows* queries by a block's keys.

    Arguments: queries [rows, words], keys [words, 32 words], words, out [rows, 32] float32 at a distance of
    STRETCH, and an address of as many bytes as the keys take that are needed next.
    """

    def emit(b: Any, queries: Any, keys: Any, words: Any, out: Any, ahead: Any) -> None:
        starts = [offset(b, queries, b.mul(words, integer(r)), 4) for r in range(rows)]

        def body(word: Any, sums: list[Any]) -> list[Any]:
            _prefetch(b, ahead, word)
            at = offset(b, keys, word, 128)
            found = [m.load(b, b.add(at, integer(64 * i)), m.INTS) for i in (0, 1)]
            new = []
            for r, start in enumerate(starts):
                own = m.splat(b, m.load(b, offset(b, start, word, 4), m.I32))
                new += [_multiply(b, half, sums[2 * r + i], own, found[i]) for i in (0, 1)]
            return new

        sums = m.counted_loop(b, words, [m.floats(0.0)] * (2 * rows), body)
        for i, value in enumerate(sums):
            m.store(b, b.add(out, integer(4 * STRETCH * (i // 2) + 64 * (i % 2))), value)

    return m.kernel([_i8] * 5, emit)


def _weigh(rows: int, half: bool, vectors: int) -> Any:
    """Make the kernel that adds a block's values, weighted, to *rows* sums of 16 x *vectors* columns.

    Arguments: weights [rows, words] at a distance of 4 STRETCH bytes, how many tokens count, values
    [words, value_dim words], value_dim, sums [rows, value_dim] float32, and an address of which as many
    words of 32 numbers are needed next.
    """

    def emit(b: Any, weights: Any, tokens: Any, values: Any, value_dim: Any, sums: Any, ahead: Any) -> None:
        places, carried = [], []
        for r in range(rows):
            start = offset(b, sums, b.mul(value_dim, integer(r)), 4)
            places += [b.add(start, integer(64 * i)) for i in range(vectors)]
        carried = [m.load(b, place, m.FLOATS) for place in places]
        count = b.lshr(b.add(tokens, integer(1)), integer(1)) if half else tokens

        def body(word: Any, held: list[Any]) -> list[Any]:
            _prefetch(b, ahead, word)
            at = offset(b, values, b.mul(word, value_dim), 4)
            found = [m.load(b, b.add(at, integer(64 * i)), m.INTS) for i in range(vectors)]
            if half:
                # What lies beside the last of an odd number of tokens may be NaN, which no weight makes 0.
                both = b.icmp_signed("<", b.add(b.add(word, word), integer(1)), tokens)
                keep = b.select(both, ir.Constant(m.I32, -1), ir.Constant(m.I32, 0xFFFF))
                found = [b.and_(words, m.splat(b, keep)) for words in found]
            new = []
            for r in range(rows):
                place = offset(b, b.add(weights, integer(4 * STRETCH * r)), word, 4)
                weight = m.splat(b, m.load(b, place, m.I32))
                new += [_multiply(b, half, held[vectors * r + i], weight, found[i]) for i in range(vectors)]
            return new

        for place, value in zip(places, m.counted_loop(b, count, carried, body), strict=True):
            m.store(b, place, value)

    return m.kernel([_i8] * 6, emit)


def _softmax(
    half: bool, b: Any, scores: Any, vectors: Any, first: Any, end: Any, softcap: Any, state: Any
) -> Any:
    """Turn a query's scores of a stretch into weights, in place, and bring its state forward.

    scores    [16 x vectors] float32; those from *first* up to but not including *end* are visible. Weights
              are bfloat16 for bfloat16 memory, at the beginning of the place of the scores
    state     the maximum and the sum so far, float32

    Returns by what the weights of earlier stretches are to be multiplied.
    """
    lanes = ir.Constant(m.INTS, list(range(m.LANES)))
    low, high = (m.splat(b, b.trunc(bound, m.I32)) for bound in (first, end))
    capped = b.fcmp_ordered(">", softcap, ir.Constant(m.F32, 0.0))
    # Without a cap the division must still be finite.
    cap = m.splat(b, b.select(capped, softcap, ir.Constant(m.F32, 1.0)))

    def larger(left: Any, right: Any) -> Any:
        return b.select(b.fcmp_ordered(">", left, right), left, right)

    def mask(i: Any, carried: list[Any]) -> list[Any]:
        place = offset(b, scores, i, 64)
        value = m.load(b, place, m.FLOATS)
        with b.if_else(capped) as (then, otherwise):
            with then:
                bounded = b.fmul(_tanh(b, b.fdiv(value, cap)), cap)
                there = b.block
            with otherwise:
                elsewhere = b.block
        chosen = b.phi(m.FLOATS)
        chosen.add_incoming(bounded, there)
        chosen.add_incoming(value, elsewhere)
        lane = b.add(lanes, m.splat(b, b.trunc(b.mul(i, integer(m.LANES)), m.I32)))
        visible = b.and_(b.icmp_signed(">=", lane, low), b.icmp_signed("<", lane, high))
        value = b.select(visible, chosen, m.floats(float("-inf")))
        m.store(b, place, value)
        return [larger(value, carried[0])]

    (highest,) = m.counted_loop(b, vectors, [m.floats(-1e30)], mask)
    before = m.load(b, state, m.F32)
    maximum = larger(before, m.reduce(b, highest, larger))
    highest = m.splat(b, maximum)

    def weigh(i: Any, carried: list[Any]) -> list[Any]:
        place = offset(b, scores, i, 64)
        weight = m.exp(b, b.fsub(m.load(b, place, m.FLOATS), highest))
        if half:
            # Half as wide, so never ahead of what is still to be read.
            rounded = m.narrow(b, weight)
            m.store(b, offset(b, scores, i, 32), rounded)
            weight = m.widen(b, rounded)
        else:
            m.store(b, place, weight)
        return [b.fadd(carried[0], weight)]

    (total,) = m.counted_loop(b, vectors, [m.floats(0.0)], weigh)
    decay = b.extract_element(m.exp(b, b.fsub(m.splat(b, before), highest)), ir.Constant(m.I32, 0))
    so_far = b.fmul(m.load(b, b.add(state, integer(4)), m.F32), decay)
    m.store(b, state, maximum)
    m.store(b, b.add(state, integer(4)), b.fadd(so_far, m.reduce(b, total, lambda x, y: b.fadd(x, y))))
    return decay


_softmax_half = m.kernel([_i8, _i8, _i8, _i8, _f4, _i8], partial(_softmax, True), _f4)
_softmax_full = m.kernel([_i8, _i8, _i8, _i8, _f4, _i8], partial(_softmax, False), _f4)


def _tanh(b: Any, x: Any) -> Any:
    bounded = b.select(b.fcmp_ordered(">", x, m.floats(20.0)), m.floats(20.0), x)
    twice = m.exp(b, b.fadd(bounded, bounded))
    return b.fsub(m.floats(1.0), b.fdiv(m.floats(2.0), b.fadd(twice, m.floats(1.0))))


def _dispatch(make: Any, arguments: int) -> Any:
    """Make a function that takes 1 to 12 rows through the kernels for 1, 2, 3, 4, 6, 7, 8 and 12."""
    k1, k2, k3, k4, k6, k7, k8, k12 = (make(rows) for rows in (1, 2, 3, 4, 6, 7, 8, 12))
    names = ", ".join(f"a{i}" for i in range(arguments))
    lines = [f"def chosen(rows, {names}):"]
    for rows in (1, 2, 3, 4, 6, 7, 8):
        lines += [f"    if rows <= {rows}:", f"        k{rows}({names})", "        return"]
    lines.append(f"    k12({names})")
    scope = {"k1": k1, "k2": k2, "k3": k3, "k4": k4, "k6": k6, "k7": k7, "k8": k8, "k12": k12}
    exec("\n".join(lines), scope)
    return m.compiled(scope["chosen"])


_scores_half = _dispatch(lambda rows: _scores(rows, True), 5)
_scores_full = _dispatch(lambda rows: _scores(rows, False), 5)
_weigh_half = _dispatch(lambda rows: _weigh(rows, True, 2), 6)
_weigh_full = _dispatch(lambda rows: _weigh(rows, False, 2), 6)
_weigh_half_last = _dispatch(lambda rows: _weigh(rows, True, 1), 6)
_weigh_full_last = _dispatch(lambda rows: _weigh(rows, False, 1), 6)


def scratch_bytes(head_dim: int, value_dim: int) -> int:
    """Return how many bytes one thread works in."""
    return MOST_QUERIES * (head_dim + STRETCH + value_dim + 2) * 4


@m.compiled
def attend_tile(
    watch: int, layer: Any, ragged: Any, tile: int, kv_head: int, head: int, group: int, queries: int,
    query_row: int, out: int, out_row: int, scratch: int,
) -> None:  # fmt: skip
    """Attend from the queries of one tile to one KV head.

    watch       of `team.Watch`, as everywhere here
    tile        index into the tile table
    head        the first of the *group* heads to compute, which share the KV head; the tile's tokens times
                *group* are at most MOST_QUERIES
    queries     address of the step's [tokens, heads, head_dim] float32, query_row bytes a token
    out         the same, [tokens, heads, value_dim as stored]
    scratch     address of `scratch_bytes` bytes of the thread's own
    """
    table = carray(pointer(ragged.tile_table), (ragged.tiles, 3), np.int32)
    row, begin, count = table[tile, 0], table[tile, 1], table[tile, 2]
    positions = carray(pointer(ragged.positions), (ragged.tokens,), np.int32)
    blocks = carray(pointer(ragged.blocks + 4 * ragged.table_width * row), (ragged.table_width,), np.int32)
    dim, wide = layer.head_dim, layer.value_dim
    rows = count * group
    own = scratch
    scores = own + 4 * MOST_QUERIES * dim
    sums = scores + 4 * MOST_QUERIES * STRETCH
    states = sums + 4 * MOST_QUERIES * wide
    words = (dim + 1) // 2 if layer.half else dim
    total = carray(pointer(sums), (MOST_QUERIES, wide), np.float32)
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
        store_float(states + 8 * r, np.float32(-1e30))
        store_float(states + 8 * r + 4, np.float32(0.0))
    last = positions[begin + count - 1]
    first = 0
    if layer.window > 0:
        first = max(0, positions[begin] - layer.window + 1) // STRETCH * STRETCH
    key_block, value_block, packed = 128 * words, 4 * BLOCK * wide, 4 * BLOCK
    if layer.half:
        value_block, packed = value_block // 2, packed // 2
    for start in range(first, last + 1, STRETCH):
        begins = start // BLOCK
        many = min(STRETCH // BLOCK, last // BLOCK + 1 - begins)
        for i in range(many):
            if m.CHECKED:
                team.require(watch, team.KV_BLOCK, blocks[begins + i], layer.blocks)
            block = np.int64(blocks[begins + i]) * layer.kv_heads + kv_head
            keys, values = layer.keys + block * key_block, layer.values + block * value_block
            if layer.half:
                _scores_half(rows, own, keys, words, scores + 4 * BLOCK * i, values)
            else:
                _scores_full(rows, own, keys, words, scores + 4 * BLOCK * i, values)
        for r in range(rows):
            position = positions[begin + r // group]
            end = min(max(position + 1 - start, 0), STRETCH)
            lowest = 0
            if layer.window > 0:
                lowest = max(position - layer.window + 1 - start, 0)
            place, state, vectors = scores + 4 * STRETCH * r, states + 8 * r, many * (BLOCK // 16)
            if layer.half:
                decay = _softmax_half(place, vectors, lowest, end, layer.softcap, state)
            else:
                decay = _softmax_full(place, vectors, lowest, end, layer.softcap, state)
            if decay != np.float32(1.0):
                for d in range(wide):
                    total[r, d] *= decay
        for i in range(many):
            block = np.int64(blocks[begins + i]) * layer.kv_heads + kv_head
            values = layer.values + block * value_block
            following = np.int64(blocks[min(begins + many + i, last // BLOCK)]) * layer.kv_heads + kv_head
            ahead = layer.keys + following * key_block
            visible = min(last + 1 - start - i * BLOCK, BLOCK)
            weights = scores + packed * i
            column = 0
            while column < wide:
                whole = column + 32 <= wide
                place, sum_, next_ = values + column * 4, sums + column * 4, ahead + column * packed
                if layer.half:
                    if whole:
                        _weigh_half(rows, weights, visible, place, wide, sum_, next_)
                    else:
                        _weigh_half_last(rows, weights, visible, place, wide, sum_, next_)
                elif whole:
                    _weigh_full(rows, weights, visible, place, wide, sum_, next_)
                else:
                    _weigh_full_last(rows, weights, visible, place, wide, sum_, next_)
                column += 32
    for r in range(rows):
        place = out + out_row * (begin + r // group) + 4 * wide * (head + r % group)
        result = carray(pointer(place), (wide,), np.float32)
        share = np.float32(1.0) / load_float(states + 8 * r + 4)
        for d in range(wide):
            result[d] = total[r, d] * share


@m.compiled
def store_token(
    watch: int, layer: Any, ragged: Any, token: int, keys: int, values: int, value_dim: int
) -> None:
    """Write one token's key and value of each KV head into its block.

    keys        address of [kv_heads, head_dim] float32
    values      address of [kv_heads, value_dim] float32, *value_dim* as the model has it
    """
    positions = carray(pointer(ragged.positions), (ragged.tokens,), np.int32)
    token_rows = carray(pointer(ragged.token_rows), (ragged.tokens,), np.int32)
    position = positions[token]
    table = ragged.blocks + 4 * ragged.table_width * token_rows[token]
    blocks = carray(pointer(table), (ragged.table_width,), np.int32)
    if m.CHECKED:
        team.require(watch, team.KV_BLOCK, blocks[position // BLOCK], layer.blocks)
    place = np.int64(blocks[position // BLOCK]) * layer.kv_heads
    at = position % BLOCK
    dim, wide = layer.head_dim, layer.value_dim
    for head in range(layer.kv_heads):
        key = carray(pointer(keys + 4 * dim * head), (dim,), np.float32)
        value = carray(pointer(values + 4 * value_dim * head), (value_dim,), np.float32)
        if layer.half:
            words = (dim + 1) // 2
            half_keys = carray(
                pointer(layer.keys + (place + head) * 128 * words), (words, BLOCK, 2), np.uint16
            )
            half_values = carray(
                pointer(layer.values + (place + head) * 2 * BLOCK * wide), (BLOCK // 2, wide, 2), np.uint16
            )
            for d in range(dim):
                half_keys[d // 2, at, d % 2] = to_bfloat16(key[d])
            for d in range(value_dim):
                half_values[at // 2, d, at % 2] = to_bfloat16(value[d])
        else:
            full_keys = carray(pointer(layer.keys + (place + head) * 128 * dim), (dim, BLOCK), np.float32)
            full_values = carray(
                pointer(layer.values + (place + head) * 4 * BLOCK * wide), (BLOCK, wide), np.float32
            )
            for d in range(dim):
                full_keys[d, at] = key[d]
            for d in range(value_dim):
                full_values[at, d] = value[d]


@m.compiled
def attend_unit(
    watch: int,
    layer: Any,
    ragged: Any,
    unit: int,
    queries: int,
    query_row: int,
    out: int,
    out_row: int,
    scratch: int,
) -> None:
    """Attend one of the step's `units`; see `attend_tile`."""
    group = layer.heads // layer.kv_heads
    parts = (group + MOST_QUERIES - 1) // MOST_QUERIES
    size = (group + parts - 1) // parts
    tile, rest = unit // (layer.kv_heads * parts), unit % (layer.kv_heads * parts)
    kv_head, part = rest // parts, rest % parts
    head = kv_head * group + part * size
    heads = min(size, group - part * size)
    attend_tile(watch, layer, ragged, tile, kv_head, head, heads, queries, query_row, out, out_row, scratch)


@m.compiled
def units(layer: Any, ragged: Any) -> Any:
    """Return into how many pieces of work a step's attention falls."""
    group = layer.heads // layer.kv_heads
    return ragged.tiles * layer.kv_heads * ((group + MOST_QUERIES - 1) // MOST_QUERIES)


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Return how many tokens of a sequence a tile may hold."""
    return max(1, MOST_QUERIES // (heads // kv_heads))


@m.emitted([_f4], types.uint16)
def to_bfloat16(b: Any, value: Any) -> Any:
    """Return a float32 as bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = b.bitcast(value, m.I32)
    sixteen, one, almost, nan = (ir.Constant(m.I32, number) for number in (16, 1, 0x7FFF, 0x7FC0))
    odd = b.and_(b.lshr(bits, sixteen), one)
    rounded = b.lshr(b.add(b.add(bits, almost), odd), sixteen)
    known = b.fcmp_ordered("==", value, value)
    return b.trunc(b.select(known, rounded, nan), m.I16)
