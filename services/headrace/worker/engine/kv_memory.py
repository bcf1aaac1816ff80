"""Paged memory for keys and values as torch tensors: blocks of tokens, one allocation for all layers.

The scheduler allocates the blocks; here a block is a number. Layers may differ in heads and dimensions.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Each tensor starts at a multiple of this many bytes, as vector loads and CUDA kernels require.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The shape of the keys and values of one token in a layer.

    kv_heads   number of key and value heads
    key_dim    length of one head's key
    value_dim  length of one head's value
    """

    kv_heads: int
    key_dim: int
    value_dim: int


def bytes_per_block(layers: Mapping[int, LayerShape], block_tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block in all layers together."""
    numbers = sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in layers.values())
    return numbers * block_tokens * dtype.itemsize


class PagedMemory:
    """Keys and values of all layers: per layer two tensors [blocks, block_tokens, kv_heads, dim].

    layers         shape of each layer
    blocks         number of blocks
    block_tokens   tokens per block

    Initially zero. On the CPU the system commits a page when it is first written: memory grows with use and
    is not returned. On CUDA all of it is allocated at once.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        *,
        blocks: int,
        block_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layers = dict(layers)
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.device = device
        self.dtype = dtype
        shapes = [
            (blocks, block_tokens, layer.kv_heads, dim)
            for layer in self.layers.values()
            for dim in (layer.key_dim, layer.value_dim)
        ]
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        begins = [0]
        for size in sizes:
            begins.append(-(-(begins[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
        whole = zeros(begins[-1], device)
        tensors = [
            whole[begin : begin + size].view(dtype).view(shape)
            for begin, size, shape in zip(begins, sizes, shapes, strict=False)
        ]
        self._tensors = dict(zip(self.layers, zip(tensors[::2], tensors[1::2], strict=True), strict=True))

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values."""
        return self._tensors[layer]

    def store(self, layer: int, where: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens' keys and values.

        where   [tokens] int64, block x block_tokens + offset, see `flat_step.destinations`
        keys    [tokens, kv_heads, key_dim]; values alike
        """
        for memory, new in zip(self._tensors[layer], (keys, values), strict=True):
            memory.view(-1, *memory.shape[2:]).index_copy_(0, where, new)


def zeros(size: int, device: torch.device) -> torch.Tensor:
    """Return *size* zero bytes; on the CPU without committing their pages."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    # torch.zeros writes, and so commits, every page. Huge pages, which numpy requests, would commit 2 MiB
    # for the first token of each block and layer.
    pages = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size)
