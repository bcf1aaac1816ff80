"""The engine with a model: a `Forward` computes logits over paged KV memory, `sampling` samples from them.

`load.loading` makes these engines from files. Work of an asynchronous device is queued here, and awaited only
after the caller's own work, so that scheduling overlaps with a GPU's computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from headrace.worker.engine.cpu.decoder import Decoder
from headrace.worker.engine.flat_step import flatten
from headrace.worker.engine.forward import Forward
from headrace.worker.engine.interface import Fault, ModelInfo, Row, Token, nothing
from headrace.worker.engine.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Computed:
    """The results of a step, with its logits.

    sampling   indices of the rows that sampled
    logits     [sampling rows, vocabulary], in the model's dtype; the next step may overwrite them
    tokens     one per sampling row
    """

    sampling: list[int]
    logits: torch.Tensor
    tokens: list[Token | Fault]


class TorchEngine:
    """Computes steps of one model.

    forward   the model and its KV memory, of at least model.kv_blocks blocks
    model     its description
    """

    def __init__(self, forward: Forward, model: ModelInfo) -> None:
        self._forward = forward
        self._model = model
        device = torch.device(model.device)
        self._overlaps = device.type != "cpu"  # the device computes while this thread runs on
        self._sampler = Sampler(model.eos_ids)

    @property
    def model(self) -> ModelInfo:
        """The loaded model; constant."""
        return self._model

    def step(
        self, rows: Sequence[Row], meanwhile: Callable[[], None] = nothing
    ) -> list[Token | Fault | None]:
        """Compute all rows; see `Engine.step`.

        A row whose logits are not finite gets a Fault. Other errors, such as too little memory, are raised.
        """
        computed = self.compute(rows, meanwhile)
        results: list[Token | Fault | None] = [None] * len(rows)
        for index, token in zip(computed.sampling, computed.tokens, strict=True):
            results[index] = token
        return results

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row], meanwhile: Callable[[], None] = nothing) -> Computed:
        """Compute all rows as `step` does, and return the logits too."""
        calls = [meanwhile]  # called exactly once, even if the step fails
        try:
            flat = flatten(rows, self._model.block_tokens)
            if not self._overlaps:
                calls.pop()()
            logits = self._forward(flat)
            sampling: list[int] = flat.sampling.tolist()
        finally:
            if calls:
                calls.pop()()
        tokens = self._sampler.sample(logits.cpu(), [rows[i] for i in sampling]) if sampling else []
        return Computed(sampling, logits, tokens)

    @torch.inference_mode()
    def profile(self, rows: Sequence[Row]) -> Mapping[str, float]:
        """Compute all rows and return the share of time of each part of the forward pass.

        Raises NotImplementedError if the model runs through transformers' own code.
        """
        if not isinstance(self._forward, Decoder):
            raise NotImplementedError("only a Decoder can be profiled by part; use torch.profiler")
        return self._forward.profile(flatten(rows, self._model.block_tokens))
