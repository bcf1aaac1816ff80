"""Batch-invariant matrix products: a row's result has the same bits whatever rows are computed beside it.

Libraries choose tiles and the order of additions by the whole shape, so the number of rows changes the last
bits (He et al., Defeating Nondeterminism in LLM Inference, 2025). Here each number of the result is computed
in one order, whatever the number of rows:

- Depth is cut into segments of SEGMENT numbers from 0. Each is accumulated from zero in blocks of fixed size,
  and the sums of segments are added in ascending order.
- With few rows there are few tiles, too few to read the weights at full speed. Then each segment has a
  program of its own, and a second kernel adds their sums in the same order (split-K with a fixed cut).
- Tiles have 64 or 128 rows and always 128 columns, with one group of four warps per 64 rows. So both compile
  to the same instruction: m64n128k16 of wgmma on compute capability 9.0, m16n8k16 of mma.sync on 8.x, 12.x.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.variants import Variant

SEGMENT = 1024

# With fewer tiles than this, each segment gets its own program: to write and read the sums of segments costs
# less than multiprocessors that do nothing. A large GPU has 132.
_FEW_PROGRAMS = 96
_MERGED = 1024  # numbers per program of the second kernel


@dataclass(frozen=True, slots=True)
class Tile:
    """The part of a product that a program computes at a time, and how.

    rows, columns   of the result
    depth           numbers of a row of x and of the weights, multiplied at a time
    warps, stages   of the program
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By first number of the compute capability: for few rows and for many. Tiles of fewer rows would compile to
# other instructions, and would not be faster: reading the weights takes longer. The depth of a tile changes
# no bit: the instructions take 16 numbers at a time, in ascending order.
_TILES = {
    8: (
        Tile(rows=64, columns=128, depth=32, warps=4, stages=6),  # a depth of 64 spills registers
        Tile(rows=128, columns=128, depth=32, warps=8, stages=5),
    ),
    9: (
        Tile(rows=64, columns=128, depth=64, warps=4, stages=4),
        Tile(rows=128, columns=128, depth=64, warps=8, stages=3),
    ),
}
_LARGE_FROM = 512  # rows

# Without tensor cores, a thread multiplies one number at a time, and larger tiles need too many registers.
_FLOAT32 = Tile(rows=64, columns=64, depth=16, warps=4, stages=3)


# Numbers of rows differ from step to step: compile once for all of them.
@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    DEPTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    # Programs that run at the same time share weights: GROUP tiles of rows, then the next tile of columns.
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    group = program // (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    row = (group * GROUP + within % group_rows) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (within // group_rows) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[None, :]

    depth = tl.arange(0, BLOCK_DEPTH)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride + depth[None, :]
    weight_columns = weights + column.to(tl.int64)[None, :] * DEPTH + depth[:, None]
    segments: tl.constexpr = (DEPTH + SEGMENT - 1) // SEGMENT
    segment = tl.program_id(1)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for cut in range(segment, segment + 1 if SPLIT else segments):
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for begin in range(cut * SEGMENT, tl.minimum((cut + 1) * SEGMENT, DEPTH), BLOCK_DEPTH):
            if DEPTH % BLOCK_DEPTH == 0:
                left = tl.load(x_rows + begin, mask=row_inside, other=0.0)
                right = tl.load(weight_columns + begin, mask=column_inside, other=0.0)
            else:
                inside = begin + depth < DEPTH
                left = tl.load(x_rows + begin, mask=row_inside & inside[None, :], other=0.0)
                right = tl.load(weight_columns + begin, mask=column_inside & inside[:, None], other=0.0)
            product = tl.dot(left, right, product, input_precision="ieee")
        total += product

    places = row.to(tl.int64)[:, None] * columns + column[None, :]
    if SPLIT:
        places += segment.to(tl.int64) * rows * columns
    elif BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + places, total, mask=row_inside & column_inside)


@triton.jit(do_not_specialize=["rows"])
def _merge(
    sums: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    SEGMENTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    places = row * columns + column
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for segment in tl.static_range(SEGMENTS):
        total += tl.load(sums + segment * rows.to(tl.int64) * columns + places, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, total, mask=inside)


def matmul(
    x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x @ weights.T + bias; each row has the same bits whatever the other rows are.

    x         [rows, depth]; the numbers of a row are adjacent
    weights   [columns, depth], contiguous
    bias      [columns], or None
    out       [rows, columns], contiguous: receives the result; a new tensor by default

    All tensors have one dtype; sums are float32, and products of float32 are not rounded to TF32.
    """
    (rows, depth), columns = x.shape, len(weights)
    if out is None:
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    tile = tile_of(rows, x.dtype, _major(x.device))
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    segments = triton.cdiv(depth, SEGMENT)
    split = segments > 1 and tiles < _FEW_PROGRAMS
    if split:
        sums = torch.empty(segments, rows, columns, dtype=torch.float32, device=x.device)
    _multiply[(tiles, segments if split else 1)](
        x,
        weights,
        x if bias is None else bias,  # not read without one
        sums if split else out,
        rows,
        columns,
        x.stride(0),
        DEPTH=depth,
        SPLIT=split,
        BIAS=bias is not None and not split,
        **_tile_constants(tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    if split:
        _merge[(rows, triton.cdiv(columns, _MERGED))](
            sums,
            x if bias is None else bias,
            out,
            rows,
            columns,
            SEGMENTS=segments,
            BIAS=bias is not None,
            BLOCK=_MERGED,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def tile_of(rows: int, dtype: torch.dtype, major: int) -> Tile:
    """Return the tile for products of this many rows; all tiles of a dtype and a device give the same bits.

    major   first number of the device's compute capability
    """
    if dtype is torch.float32:
        return _FLOAT32
    # Others, such as 12, multiply with the instructions of 8, which need the registers of its tiles.
    return _TILES[9 if major in (9, 10) else 8][rows >= _LARGE_FROM]


@functools.cache
def _major(device: torch.device) -> int:
    """Return the first number of the compute capability; the CPU interprets kernels as if for 9.0."""
    return torch.cuda.get_device_capability(device)[0] if device.type != "cpu" else 9


def _tile_constants(tile: Tile) -> dict[str, int]:
    return {
        "SEGMENT": SEGMENT,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "GROUP": 8,
    }


def variants() -> list[Variant]:
    """Return how real models use the kernels of this module."""
    integers = {"rows": "i32", "columns": "i32", "x_stride": "i32"}

    def multiply(
        name: str,
        tile: Tile,
        dtype: str,
        depth: int,
        targets: tuple[int, ...] = (),
        *,
        split: bool,
        bias: bool,
    ) -> Variant:
        pointers = dict.fromkeys(("x", "weights", "bias", "out"), f"*{dtype}")
        return Variant(
            name=f"{name}, depth {depth}{', split' if split else ''}{', bias' if bias else ''}",
            kernel=_multiply,
            signature={**pointers, **integers, "out": "*fp32" if split else f"*{dtype}"},
            constants={"DEPTH": depth, "SPLIT": split, "BIAS": bias, **_tile_constants(tile)},
            num_warps=tile.warps,
            num_stages=tile.stages,
            aligned=frozenset({"columns", "x_stride"}),
            targets=targets,
        )

    return [
        *(
            multiply(f"{tile.rows} rows on {target}", tile, dtype, depth, (target,), split=split, bias=bias)
            for target, tiles in ((80, _TILES[8]), (90, _TILES[9]))
            for tile in tiles
            for dtype, depth, split, bias in (
                ("bf16", 896, False, True),
                ("bf16", 4096, False, False),
                ("fp16", 14336, True, False),
            )
        ),
        multiply("float32", _FLOAT32, "fp32", 896, split=False, bias=True),
        multiply("float32", _FLOAT32, "fp32", 4096, split=True, bias=False),
        Variant(
            name="merge",
            kernel=_merge,
            signature={"sums": "*fp32", "bias": "*bf16", "out": "*bf16", "rows": "i32", "columns": "i32"},
            constants={"SEGMENTS": 4, "BIAS": True, "BLOCK": _MERGED},
            aligned=frozenset({"columns"}),
        ),
    ]
