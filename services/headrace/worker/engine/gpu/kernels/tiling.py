"""How attention is divided among programs: lines of a query tile, keys of a key tile, warps, stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SEGMENT = 256  # keys of a segment; a multiple of every key tile

FEWEST_LINES = 16  # of a query tile: the least that tensor cores multiply

# Shared memory of a program by compute capability (CUDA C++ Programming Guide, technical specifications).
_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024}
_LEAST_SHARED_BYTES = 99 * 1024


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a program is shaped. Bits depend on all but `num_stages`.

    lines        lines of the query tile: one per token and query head
    key_tile     keys that are read at once
    num_warps    warps of the program
    num_stages   stages of the pipeline that loads key tiles
    """

    lines: int
    key_tile: int
    num_warps: int
    num_stages: int


def tiling(tile: int, group: int, key_dim: int, value_dim: int, itemsize: int, capability: int) -> Tiling:
    """Choose the shape of a program.

    tile         tokens of a query tile
    group        query heads per key head
    itemsize     bytes of a number of queries, keys and values: 2 or 4
    capability   compute capability of the device, such as 90
    """
    lines = max(power_of_2(tile * group), FEWEST_LINES)
    keys, values = padded_dim(key_dim), padded_dim(value_dim)
    widest = max(keys, values)
    if itemsize == 4:
        # Without tensor cores, all operands are in registers.
        return Tiling(lines, 16 if widest > 64 else 32, 4 if lines * widest <= 16 * 128 else 8, 1)
    key_tile = 64 if widest <= 128 else 8192 // widest
    room = shared_bytes(capability)
    if lines < 64:
        # Limited by bandwidth: as many bytes in flight as possible. Triton spends two stages on a key tile in
        # flight, because its keys are found through the block table. With three stages, a program waits for
        # a tile as soon as it has asked for it; with five, it computes one meanwhile. Registers allow three
        # programs per multiprocessor, which must still fit with a second tile.
        two_tiles = 2 * key_tile * (keys + values) * itemsize
        return Tiling(lines, key_tile, 4, 5 if 3 * (two_tiles + 8192) < room else 3)
    if room < _SHARED_BYTES[90] and widest > 64:
        key_tile //= 2  # without warpgroup products, scores and all operands are in registers too
    needed = (lines * keys + 3 * key_tile * (keys + values)) * itemsize
    return Tiling(lines, key_tile, 4 if lines == 64 else 8, 5 if needed < room - 4096 else 3)


def tile_for(group: int, key_dim: int, value_dim: int, itemsize: int, *, exact: bool) -> int:
    """Return how many tokens a query tile of mixed steps has in a layer; at least 1.

    exact   use as few lines as decodes do, so that bits are the same
    """
    lines = 128 if max(key_dim, value_dim) <= 128 else max(16384 // padded_dim(max(key_dim, value_dim)), 16)
    if exact or itemsize == 4:
        lines = FEWEST_LINES
    return max(lines // group, 1)


def padded_dim(dim: int) -> int:
    """Return the width of a tile that holds heads of this dimension: a power of two, at least 16."""
    return max(power_of_2(dim), 16)


def power_of_2(number: int) -> int:
    """Return the least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def shared_bytes(capability: int) -> int:
    """Return how much shared memory a program may use, given the compute capability."""
    return _SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES)


def capability_of(device: torch.device) -> int:
    """Return the compute capability of a device, such as 90; 0 for the CPU."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
