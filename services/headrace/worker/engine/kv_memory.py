"""Paged memory for keys and values as torch tensors: blocks of tokens, one allocation for all layers.

Who owns which block is the scheduler's business; here a block is a number. Layers may differ in heads
and dimensions.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Each tensor starts at a multiple of so many bytes, as vector loads and CUDA kernels like it.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer keeps of each token.

    kv_heads   heads of keys and values
    key_dim    numbers of one head's key
    value_dim  numbers of one head's value
    """

    kv_heads: int
    key_dim: int
    value_dim: int


def bytes_per_block(layers: Mapping[int, LayerShape], block_tokens: int, dtype: torch.dtype) -> int:
    """Return what one block takes in all layers together."""
    numbers = sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in layers.values())
    return numbers * block_tokens * dtype.itemsize


class PagedMemory:
    """Keys and values of all layers: per layer two tensors [blocks, block_tokens, kv_heads, dim].

    layers         what each layer keeps
    blocks         how many blocks there are
    block_tokens   tokens that a block holds

    It starts as zeros. On the CPU these are pages that the system commits when they are first written:
    memory grows with use and stays. On CUDA all of it is taken at once.
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
    """Return *size* bytes that are zero, on the CPU without touching them."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    # torch.zeros writes, and so commits, every page. Huge pages, which numpy asks for, would commit 2 MiB
    # for the first token of every block and layer.
    pages = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size)
