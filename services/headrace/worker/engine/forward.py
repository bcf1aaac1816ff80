"""Compute a step's logits on the CPU: the engine's interface to the model, and transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from headrace.worker.engine.flat_step import FlatStep, Longs
from headrace.worker.engine.transformers_attention import StepAttention


class Forward(Protocol):
    """Computes one model over its paged memory."""

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """Store the step's keys and values and compute its logits.

        Returns [sampling rows, vocabulary], in the order of `flat.sampling`; valid until the next call.
        """
        ...

    def logits_of(self, places: Longs) -> torch.Tensor:
        """Compute the logits of any tokens of the latest step, which must have `flat.scored`.

        places   [places] indices of tokens. All their logits are in memory at once

        Returns [places, vocabulary]; valid until the next call. In exact engines, with the bits of any step.
        """
        ...


class NetworkHead:
    """Computes logits from the last hidden states of a network of transformers.

    The code of a network after its layers (the last product, soft caps, scales) is not a part of its own. So
    the network runs again, with its layers replaced by their results.

    network   a causal language model

    hidden   [1, tokens, hidden] the last hidden states of its latest pass
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._layers = network.base_model
        self._outputs: Any = None
        self.hidden = torch.empty(0)
        self._layers.register_forward_hook(self._keep)

    def _keep(self, layers: Any, arguments: Any, outputs: Any) -> None:
        self._outputs = type(outputs)
        self.hidden = outputs.last_hidden_state

    def logits(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the logits [places, vocabulary] of some of the hidden states [1, tokens, hidden]."""
        outputs = self._outputs(last_hidden_state=hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        self._layers.forward = lambda *arguments, **named: outputs
        try:
            logits: torch.Tensor = self._network(
                input_ids=ids, use_cache=False, logits_to_keep=places
            ).logits[0]
        finally:
            del self._layers.forward
        return logits


def scores_prompts(network: Any) -> bool:
    """Return whether the layers of a network are a module of their own, as `NetworkHead` needs."""
    return network.base_model is not network


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
        self._head = NetworkHead(network) if scores_prompts(network) else None

    def __call__(self, flat: FlatStep) -> torch.Tensor:
        """See `Forward`."""
        padding = (0, max(self._min_tokens - flat.tokens, 0))
        outputs = self._network(
            input_ids=torch.from_numpy(np.pad(flat.ids, padding)[None]),
            position_ids=torch.from_numpy(np.pad(flat.positions, padding)[None]),
            use_cache=False,
            logits_to_keep=self._kept(flat.last),
            headrace_step=self._attention(flat),
        )
        logits: torch.Tensor = outputs.logits[0, : len(flat.last)]
        return logits

    def logits_of(self, places: Longs) -> torch.Tensor:
        """See `Forward`."""
        assert self._head is not None
        return self._head.logits(self._head.hidden, self._kept(places))[: len(places)]

    def _kept(self, places: Longs) -> torch.Tensor:
        if len(places):
            places = np.pad(places, (0, max(self._min_tokens - len(places), 0)), mode="edge")
        return torch.from_numpy(places)
