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


@m.jit
def store_token(
    failures: int, layer: Any, ragged: Any, token: int, keys: int, values: int, value_dim: int
) -> None:
    """Write the key and value of one token into its block, for each KV head.

    keys        address of [kv_heads, head_dim] float32
    values      address of [kv_heads, value_dim] float32, *value_dim* of the model, not the stored one
    """
    positions = carray(pointer(ragged.positions), (ragged.tokens,), np.int32)
    token_rows = carray(pointer(ragged.token_rows), (ragged.tokens,), np.int32)
    position = positions[token]
    table = ragged.blocks + 4 * ragged.table_width * token_rows[token]
    blocks = carray(pointer(table), (ragged.table_width,), np.int32)
    if m.CHECKED:
        team.require(failures, team.KV_BLOCK, blocks[position // BLOCK], layer.blocks)
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
