"""From a step's rows to logits: what the engine asks of whatever computes the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.gpu.static_decodes import StaticDecodes
from headrace.worker.engine.gpu.varlen import VarlenAttention, VarlenIndex, compute, upload
from headrace.worker.engine.kv_memory import PagedMemory
from headrace.worker.engine.transformers_attention import StepAttention


class Forward(Protocol):
    """Computes one model over its paged memory."""

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """Store the step's keys and values and compute its logits.

        Returns [sampling rows, vocabulary], in the order of `flat.sampling`; valid until the next call. On
        CUDA the work is queued, and not waited for.
        """
        ...


class TransformersForward:
    """Any network of transformers, through its own code, on the CPU.

    network      a causal language model whose attention is `attention.IMPLEMENTATION`, in evaluation mode
    attention    makes a step's attention
    min_tokens   smaller steps are padded up to so many tokens, and so many get logits
    """

    def __init__(
        self, network: Any, attention: Callable[[FlatStep], StepAttention], *, min_tokens: int = 1
    ) -> None:
        self._network = network
        self._attention = attention
        self._min_tokens = min_tokens

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """See `Forward`."""
        padding = (0, max(self._min_tokens - flat.tokens, 0))
        kept = flat.last
        if len(kept):
            kept = np.pad(kept, (0, max(self._min_tokens - len(kept), 0)), mode="edge")
        device = self._network.device
        outputs = self._network(
            input_ids=cuda.to_device(torch.from_numpy(np.pad(flat.ids, padding)[None]), device),
            position_ids=cuda.to_device(torch.from_numpy(np.pad(flat.positions, padding)[None]), device),
            use_cache=False,
            logits_to_keep=cuda.to_device(torch.from_numpy(kept), device),
            headrace_step=self._attention(flat),
        )
        logits: torch.Tensor = outputs.logits[0, : len(flat.last)]
        return logits


class VarlenForward:
    """Any network of transformers on CUDA, where FlashAttention takes its heads.

    decodes   computes steps of decodes only, where it can; see `StaticDecodes`
    """

    def __init__(self, network: Any, memory: PagedMemory, decodes: StaticDecodes | None = None) -> None:
        self._network = network
        self._memory = memory
        self._decodes = decodes

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """See `Forward`."""
        if self._decodes is not None and self._decodes.takes(flat):
            return self._decodes(flat)
        index = upload(VarlenIndex.of(flat, self._memory.block_tokens), self._memory.device)
        attention = VarlenAttention.of(self._memory, index, flat)
        kept = cuda.to_device(torch.from_numpy(flat.last), self._memory.device)
        return compute(self._network, index, attention, kept)
