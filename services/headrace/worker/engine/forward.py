"""Compute a step's logits on the CPU: the engine's interface to the model, and transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from headrace.worker.engine.flat_step import FlatStep
from headrace.worker.engine.transformers_attention import StepAttention


class Forward(Protocol):
    """Computes one model over its paged memory."""

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """Store the step's keys and values and compute its logits.

        Returns [sampling rows, vocabulary], in the order of `flat.sampling`; valid until the next call.
        """
        ...


class TransformersForward:
    """Computes a network of transformers on the CPU, through its own code.

    network      a causal language model in evaluation mode whose attention is
                 `transformers_attention.IMPLEMENTATION`
    attention    makes a step's attention
    min_tokens   smaller steps are padded to this many tokens and rows of logits
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
        outputs = self._network(
            input_ids=torch.from_numpy(np.pad(flat.ids, padding)[None]),
            position_ids=torch.from_numpy(np.pad(flat.positions, padding)[None]),
            use_cache=False,
            logits_to_keep=torch.from_numpy(kept),
            headrace_step=self._attention(flat),
        )
        logits: torch.Tensor = outputs.logits[0, : len(flat.last)]
        return logits
