"""Compute the steps of any network of transformers on CUDA, with FlashAttention and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.gpu.static_decodes import StaticDecodes
from headrace.worker.engine.gpu.varlen import VarlenAttention, VarlenIndex, run_network, upload
from headrace.worker.engine.interface import ModelInfo
from headrace.worker.engine.kv_memory import PagedMemory


class VarlenForward:
    """Implements `Forward` where FlashAttention supports the heads of the model.

    decodes   computes the steps that it accepts; see `StaticDecodes`
    """

    def __init__(self, network: Any, memory: PagedMemory, decodes: StaticDecodes | None = None) -> None:
        self._network = network
        self._memory = memory
        self._decodes = decodes

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """See `Forward`."""
        if self._decodes is not None and self._decodes.accepts(flat):
            return self._decodes(flat)
        index = upload(VarlenIndex.of(flat, self._memory.block_tokens), self._memory.device)
        attention = VarlenAttention.of(self._memory, index, flat)
        kept = cuda.to_device(torch.from_numpy(flat.last), self._memory.device)
        return run_network(self._network, index, attention, kept)


def with_cuda_graphs(
    network: Any, memory: PagedMemory, model: ModelInfo, progress: Callable[[str], None]
) -> VarlenForward:
    """Capture CUDA graphs for steps of decodes; without them if the code of the model cannot be captured."""
    progress("capturing CUDA graphs")
    try:
        decodes = StaticDecodes(
            network,
            memory,
            max_rows=model.max_running,
            context_length=model.context_length,
            vocabulary=model.vocabulary_size,
            capture=cuda.GraphPool(memory.device).capture,
        )
    except RuntimeError as error:
        progress(f"{type(network).__name__} computes without CUDA graphs, which is slower: {error}")
        return VarlenForward(network, memory)
    return VarlenForward(network, memory, decodes)
