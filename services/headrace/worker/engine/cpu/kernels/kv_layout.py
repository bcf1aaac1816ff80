"""The layout of keys and values in paged memory, and of a step's tokens, as the kernels read them.

Memory is divided into blocks of 32 tokens, which sequences reference through block tables (Kwon et al.,
PagedAttention, SOSP 2023). In a block, the keys of each KV head are transposed, so that one instruction
multiplies a query by 16 keys. Values are stored in their natural order. Numbers are grouped in words of 4
bytes, as in `matmul`: one float32, or two bfloat16 of neighbouring dimensions or tokens, which one
instruction multiplies and adds:

    keys    [blocks, kv_heads, head_dim, 32] float32, or [blocks, kv_heads, head_dim / 2, 32, 2] bfloat16
    values  [blocks, kv_heads, 32, value_dim] float32, or [blocks, kv_heads, 16, value_dim, 2] bfloat16
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels import team
from headrace.worker.engine.cpu.kernels.elementwise import pointer

BLOCK = 2 * m.LANES  # tokens

# The memory of one layer, and the parameters of its attention.
LAYER = np.dtype(
    [
        ("keys", np.int64),  # addresses
        ("values", np.int64),
        ("blocks", np.int64),  # number of blocks
        ("half", np.int64),  # 1 for bfloat16, 0 for float32
        ("heads", np.int64),
        ("kv_heads", np.int64),
        ("head_dim", np.int64),
        ("value_dim", np.int64),  # as stored: a multiple of 16
        ("window", np.int64),  # tokens that a token attends to, itself included; 0 for all
        ("scale", np.float32),
        ("softcap", np.float32),  # 0 for none
    ]
)

# The tokens that a step computes, and the block tables of their sequences.
RAGGED = np.dtype(
    [
        ("tokens", np.int64),
        ("tiles", np.int64),  # number of tiles
        ("tile_table", np.int64),  # address of [tiles, 3] int32: row, first token, tokens
        ("positions", np.int64),  # address of [tokens] int32
        ("token_rows", np.int64),  # address of [tokens] int32
        ("blocks", np.int64),  # address of [rows, table_width] int32
        ("table_width", np.int64),
    ]
)


@m.intrinsic([types.float32], types.uint16)
def to_bfloat16(b: Any, value: Any) -> Any:
    """Return a float32 as bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = b.bitcast(value, m.I32)
    sixteen, one, almost, nan = (ir.Constant(m.I32, number) for number in (16, 1, 0x7FFF, 0x7FC0))
    odd = b.and_(b.lshr(bits, sixteen), one)
    rounded = b.lshr(b.add(b.add(bits, almost), odd), sixteen)
    known = b.fcmp_ordered("==", value, value)
    return b.trunc(b.select(known, rounded, nan), m.I16)


@m.intrinsic([types.int64] * 3)
def _store_key(b: Any, key: Any, vectors: Any, place: Any) -> None:
    """Store 16 x *vectors* numbers of a key as bfloat16: words of two, 128 bytes apart."""
    pairs = m.LANES // 2

    def body(i: Any, _: list[Any]) -> list[Any]:
        shorts = m.narrow(b, m.load(b, m.offset(b, key, i, 64), m.FLOATS))
        words = b.bitcast(shorts, ir.VectorType(m.I32, pairs))
        start = m.offset(b, place, i, 128 * pairs)
        for pair in range(pairs):
            word = b.extract_element(words, ir.Constant(m.I32, pair))
            m.store(b, b.add(start, m.integer(128 * pair)), word)
        return []

    m.counted_loop(b, vectors, [], body)


@m.intrinsic([types.int64] * 4)
def _store_value(b: Any, value: Any, vectors: Any, odd: Any, place: Any) -> None:
    """Store 16 x *vectors* numbers of a value as bfloat16, in the first or second half of each word.

    The other halves are not written: they belong to another token, which another thread may write now.
    """
    kind, lanes = ir.VectorType(m.I16, 2 * m.LANES), range(2 * m.LANES)
    masks = [ir.Constant(ir.VectorType(ir.IntType(1), 2 * m.LANES), [i % 2 == which for i in lanes])
             for which in (0, 1)]  # fmt: skip
    mask = b.select(b.icmp_signed("!=", odd, m.integer(0)), masks[1], masks[0])

    def body(i: Any, _: list[Any]) -> list[Any]:
        words = b.zext(m.narrow(b, m.load(b, m.offset(b, value, i, 64), m.FLOATS)), m.INTS)
        twice = b.bitcast(b.or_(words, b.shl(words, m.ints(16))), kind)
        pointer_ = b.inttoptr(m.offset(b, place, i, 64), kind.as_pointer())
        align = ir.Constant(m.I32, 4)
        m.call(b, "llvm.masked.store.v32i16.p0", twice, pointer_, align, mask, result=ir.VoidType())
        return []

    m.counted_loop(b, vectors, [], body)


@m.intrinsic([types.int64] * 3)
def _prefetch_lines(b: Any, place: Any, count: Any, stride: Any) -> None:
    """Prefetch cache lines that are written soon, *stride* bytes apart."""

    def body(i: Any, _: list[Any]) -> list[Any]:
        m.prefetch(b, b.add(place, b.mul(i, stride)), write=True)
        return []

    m.counted_loop(b, count, [], body)


@m.jit
def _place(layer: Any, ragged: Any, token: int) -> Any:
    """Return where a token is stored: its block times KV heads, and its place in the block."""
    positions = carray(pointer(ragged.positions), (ragged.tokens,), np.int32)
    token_rows = carray(pointer(ragged.token_rows), (ragged.tokens,), np.int32)
    table = ragged.blocks + 4 * ragged.table_width * token_rows[token]
    blocks = carray(pointer(table), (ragged.table_width,), np.int32)
    return np.int64(blocks[positions[token] // BLOCK]) * layer.kv_heads, positions[token] % BLOCK


@m.jit
def prefetch_token(layer: Any, ragged: Any, token: int) -> None:
    """Prefetch the memory that `store_token` writes: a line per word, which a store alone would wait for."""
    place, at = _place(layer, ragged, token)
    words = (layer.head_dim + 1) // 2 if layer.half else layer.head_dim
    rows, row = (BLOCK // 2, at // 2) if layer.half else (BLOCK, at)
    value_row = 4 * layer.value_dim
    for head in range(layer.kv_heads):
        _prefetch_lines(layer.keys + (place + head) * 128 * words + 4 * at, words, 128)
        values = layer.values + ((place + head) * rows + row) * value_row
        _prefetch_lines(values, (value_row + 63) // 64, 64)


@m.jit
def store_token(
    failures: int, layer: Any, ragged: Any, token: int, keys: int, values: int, value_dim: int
) -> None:
    """Write the key and value of one token into its block, for each KV head.

    keys        address of [kv_heads, head_dim] float32
    values      address of [kv_heads, value_dim] float32, *value_dim* of the model, not the stored one
    """
    place, at = _place(layer, ragged, token)
    if m.CHECKED:
        team.require(failures, team.KV_BLOCK, place // layer.kv_heads, layer.blocks)
    dim, wide = layer.head_dim, layer.value_dim
    for head in range(layer.kv_heads):
        key = carray(pointer(keys + 4 * dim * head), (dim,), np.float32)
        value = carray(pointer(values + 4 * value_dim * head), (value_dim,), np.float32)
        if layer.half:
            words = (dim + 1) // 2
            key_block = layer.keys + (place + head) * 128 * words
            value_block = layer.values + (place + head) * 2 * BLOCK * wide
            half_keys = carray(pointer(key_block), (words, BLOCK, 2), np.uint16)
            half_values = carray(pointer(value_block), (BLOCK // 2, wide, 2), np.uint16)
            whole = dim // m.LANES
            if whole > 0:
                _store_key(keys + 4 * dim * head, whole, key_block + 4 * at)
            for d in range(m.LANES * whole, dim):
                half_keys[d // 2, at, d % 2] = to_bfloat16(key[d])
            whole = value_dim // m.LANES if m.HAS_MASKS else 0
            if whole > 0:
                _store_value(values + 4 * value_dim * head, whole, at % 2, value_block + at // 2 * wide * 4)
            for d in range(m.LANES * whole, value_dim):
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
