"""How attention is divided among programs: lines of a query tile, keys of a key tile, warps, stages."""

from __future__ import annotations

from dataclasses import dataclass

SEGMENT = 256  # keys of a segment; a multiple of every key tile

# Shared memory of a program by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

FEWEST_LINES = 16  # of a query tile: the least that tensor cores multiply


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a program is shaped. Bits depend on all but `num_stages`, so all others depend on the model only.

    lines        lines of the query tile: one per token and query head
    key_tile     keys that are read at once
    num_warps    warps of the program
    num_stages   key tiles that are in flight
    """

    lines: int
    key_tile: int
    num_warps: int
    num_stages: int


def tiling(tile: int, group: int, key_dim: int, value_dim: int, itemsize: int, shared_bytes: int) -> Tiling:
    """Choose the shape of a program.

    tile           tokens of a query tile
    group          query heads per key head
    itemsize       bytes of a number of queries, keys and values: 2 or 4
    shared_bytes   shared memory that a program may use
    """
    lines = max(power_of_2(tile * group), FEWEST_LINES)
    keys, values = power_of_2(key_dim), power_of_2(value_dim)
    widest = max(keys, values)
    if itemsize == 4:
        # Without tensor cores, all operands are in registers.
        return Tiling(lines, 16 if widest > 64 else 32, 4 if lines * widest <= 16 * 128 else 8, 1)
    key_tile = 64 if widest <= 128 else 32
    # Small tiles are limited by bandwidth: several programs per multiprocessor hide its latency.
    budget = shared_bytes // 2 if lines < 64 else shared_bytes - lines * keys * itemsize
    fitting = budget // (key_tile * (keys + values) * itemsize)
    return Tiling(lines, key_tile, 4 if lines <= 64 else 8, min(max(fitting, 2), 4))


def tile_for(group: int, key_dim: int, value_dim: int, itemsize: int, *, exact: bool) -> int:
    """Return how many tokens a query tile of mixed steps has in a layer; at least 1.

    exact   use as few lines as decodes do, so that bits are the same
    """
    lines = 128 if max(key_dim, value_dim) <= 128 else 64
    if exact or itemsize == 4:
        lines = FEWEST_LINES
    return max(lines // group, 1)


def power_of_2(number: int) -> int:
    """Return the least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def shared_bytes(capability: int) -> int:
    """Return how much shared memory a program may use, given the compute capability, such as 90."""
    return SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
