"""Choose a model's attention: our kernels on the CPU, FlashAttention on CUDA, plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from headrace.worker.engine import plain_attention
from headrace.worker.engine.cpu import kernel_attention
from headrace.worker.engine.cpu.kernels import paging
from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.gpu import cuda, varlen
from headrace.worker.engine.kv_memory import PagedMemory, bytes_per_block
from headrace.worker.engine.transformers_attention import LayerAttention, StepAttention

Layers = Mapping[int, LayerAttention]


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """One implementation of attention over paged memory.

    name          kernels, flash or plain
    block_tokens  tokens per block of its memory
    make_memory   makes memory of a number of blocks for the given layers
    begin         makes a step's attention over such memory
    block_bytes   returns the bytes of one block in all the given layers
    reason        why no faster kind is used; empty for the fastest
    """

    name: str
    block_tokens: int
    make_memory: Callable[[Layers, int], Any]
    begin: Callable[[Any, FlatStep], StepAttention]
    block_bytes: Callable[[Layers], int]
    reason: str = ""


def choose_kind(layers: Layers, device: torch.device, dtype: torch.dtype) -> AttentionKind:
    """Choose the fastest kind that supports these layers."""
    if device.type == "cuda":
        refusal = next(filter(None, (_flash_refusal(own, device, dtype) for own in layers.values())), "")
        return plain(device, dtype, reason=refusal) if refusal else flash(device, dtype)
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


def flash(device: torch.device, dtype: torch.dtype) -> AttentionKind:
    """Make the kind for CUDA, if FlashAttention supports the layers."""

    def begin(memory: PagedMemory, flat: FlatStep) -> StepAttention:
        index = varlen.upload(varlen.VarlenIndex.of(flat, memory.block_tokens), device)
        return varlen.VarlenAttention.of(memory, index, flat)

    return _over_tensors("flash", varlen.BLOCK_TOKENS, begin, device, dtype)


def plain(device: torch.device, dtype: torch.dtype, *, reason: str = "") -> AttentionKind:
    """Make the kind for everything else."""
    return _over_tensors(
        "plain", plain_attention.BLOCK_TOKENS, plain_attention.PlainAttention, device, dtype, reason
    )


def _over_tensors(
    name: str,
    block_tokens: int,
    begin: Callable[[Any, FlatStep], StepAttention],
    device: torch.device,
    dtype: torch.dtype,
    reason: str = "",
) -> AttentionKind:
    def make_memory(layers: Layers, blocks: int) -> PagedMemory:
        shapes = {index: own.shape for index, own in layers.items()}
        return PagedMemory(shapes, blocks=blocks, block_tokens=block_tokens, device=device, dtype=dtype)

    def block_bytes(layers: Layers) -> int:
        return bytes_per_block({index: own.shape for index, own in layers.items()}, block_tokens, dtype)

    return AttentionKind(name, block_tokens, make_memory, begin, block_bytes, reason)


def _flash_refusal(own: LayerAttention, device: torch.device, dtype: torch.dtype) -> str | None:
    if own.masking.softcap is not None:
        return "FlashAttention in torch does not support a soft cap"
    return cuda.flash_unsupported_reason(device, dtype, own.shape.key_dim, own.shape.value_dim)
