"""Choose a model's attention: our kernels on the CPU or on a GPU, and plain torch for other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from headrace.worker.engine import plain_attention
from headrace.worker.engine.cpu import kernel_attention
from headrace.worker.engine.cpu.kernels import paging
from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.kv_memory import PagedMemory, bytes_per_block
from headrace.worker.engine.load.refusals import UnsupportedModel
from headrace.worker.engine.transformers_attention import LayerAttention, StepAttention

Layers = Mapping[int, LayerAttention]

_MAX_GPU_DIM = 512  # the longest keys and values of one head that the kernels of GPUs hold in registers


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """One implementation of attention over paged memory.

    name          kernels (CPU), triton (GPU) or plain
    block_tokens  tokens per block of its memory
    make_memory   makes memory of a number of blocks for the given layers
    begin         makes a step's attention over such memory; None for triton, see `gpu.engine`
    block_bytes   returns the bytes of one block in all the given layers
    reason        why no faster kind is used; empty for the fastest
    """

    name: str
    block_tokens: int
    make_memory: Callable[[Layers, int], Any]
    begin: Callable[[Any, FlatStep], StepAttention] | None
    block_bytes: Callable[[Layers], int]
    reason: str = ""


def choose_kind(layers: Layers, device: torch.device, dtype: torch.dtype, *, gpu: bool) -> AttentionKind:
    """Choose the fastest kind that supports these layers.

    gpu   whether the kernels of GPUs compute

    Raises UnsupportedModel if a GPU cannot compute them.
    """
    if gpu:
        return triton(layers, device, dtype)
    if dtype in kernel_attention.DTYPES:
        return kernels(dtype)
    return plain(device, dtype, reason="our kernels hold float32 or bfloat16")


def kernels(dtype: torch.dtype) -> AttentionKind:
    """Make the kind for CPUs."""

    def make_memory(layers: Layers, blocks: int) -> paging.KernelMemory:
        memory = paging.KernelMemory(blocks, half=dtype is torch.bfloat16)
        for index, own in layers.items():
            memory.configure_layer(
                index,
                heads=own.heads,
                kv_heads=own.shape.kv_heads,
                head_dim=own.shape.key_dim,
                value_dim=own.shape.value_dim,
                scale=own.masking.scale,
                softcap=own.masking.softcap or 0.0,
                window=own.masking.window or 0,
            )
        return memory

    return AttentionKind(
        name="kernels",
        block_tokens=kernel_attention.BLOCK_TOKENS,
        make_memory=make_memory,
        begin=kernel_attention.KernelAttention,
        block_bytes=lambda layers: make_memory(layers, 1).block_bytes,
    )


def triton(layers: Layers, device: torch.device, dtype: torch.dtype) -> AttentionKind:
    """Make the kind for GPUs. Its memory has one block more than requested: padding is written to the last.

    Raises UnsupportedModel if the heads of the layers are too wide.
    """
    widest = max((max(own.shape.key_dim, own.shape.value_dim) for own in layers.values()), default=0)
    if widest > _MAX_GPU_DIM:
        raise UnsupportedModel(
            f"its attention heads have {widest} dimensions, and on GPUs at most {_MAX_GPU_DIM} are "
            "supported; use --device cpu, or choose another model"
        )
    # Imports Triton, which a worker on a CPU neither needs nor has.
    from headrace.worker.engine.gpu.paged_attention import BLOCK_TOKENS

    return _over_tensors("triton", BLOCK_TOKENS, None, device, dtype, spare=1)


def plain(device: torch.device, dtype: torch.dtype, *, reason: str = "") -> AttentionKind:
    """Make the kind for everything else."""
    return _over_tensors(
        "plain", plain_attention.BLOCK_TOKENS, plain_attention.PlainAttention, device, dtype, reason=reason
    )


def _over_tensors(
    name: str,
    block_tokens: int,
    begin: Callable[[Any, FlatStep], StepAttention] | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    reason: str = "",
    spare: int = 0,
) -> AttentionKind:
    def make_memory(layers: Layers, blocks: int) -> PagedMemory:
        shapes = {index: own.shape for index, own in layers.items()}
        return PagedMemory(
            shapes, blocks=blocks + spare, block_tokens=block_tokens, device=device, dtype=dtype
        )

    def block_bytes(layers: Layers) -> int:
        return bytes_per_block({index: own.shape for index, own in layers.items()}, block_tokens, dtype)

    return AttentionKind(name, block_tokens, make_memory, begin, block_bytes, reason)
