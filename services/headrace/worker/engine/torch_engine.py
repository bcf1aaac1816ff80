"""The engine with a model: a `Forward` computes logits over paged KV memory, `sampling` draws from them.

`loading` makes these engines from files. What the device computes by itself is queued here and waited for
only after the caller had its turn, so that scheduling costs a GPU nothing.
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
    """What a step made, and how.

    sampling   indices of the rows that sampled
    logits     [sampling rows, vocabulary], in the model's dtype; the next step may overwrite them
    tokens     what was drawn from them
    """

    sampling: list[int]
    logits: torch.Tensor
    tokens: list[Token | Fault]


class TorchEngine:
    """Computes steps of one model.

    forward   the model and its KV memory, of at least model.kv_blocks blocks
    model     what it tells about itself
    """

    def __init__(self, forward: Forward, model: ModelInfo) -> None:
        self._forward = forward
        self._model = model
        device = torch.device(model.device)
        self._overlaps = device.type != "cpu"  # the device computes while this thread does something else
        self._sampler = Sampler(model.eos_ids, device)

    @property
    def model(self) -> ModelInfo:
        """What is loaded; constant."""
        return self._model

    def step(
        self, rows: Sequence[Row], meanwhile: Callable[[], None] = nothing
    ) -> list[Token | Fault | None]:
        """Compute all rows; see `Engine.step`.

        A row whose logits are not finite gets a Fault. Whatever else goes wrong, such as too little
        memory, raises.
        """
        computed = self.compute(rows, meanwhile)
        results: list[Token | Fault | None] = [None] * len(rows)
        for index, token in zip(computed.sampling, computed.tokens, strict=True):
            results[index] = token
        return results

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row], meanwhile: Callable[[], None] = nothing) -> Computed:
        """Compute all rows as `step` does, and show the work."""
        turns = [meanwhile]  # it has one turn, also when the step fails
        try:
            flat = flatten(rows, self._model.block_tokens)
            if not self._overlaps:
                turns.pop()()
            logits = self._forward(flat)
            sampling: list[int] = flat.sampling.tolist()
            drawing = self._sampler.start(logits, [rows[i] for i in sampling]) if sampling else None
        finally:
            if turns:
                turns.pop()()
        return Computed(sampling, logits, drawing.tokens() if drawing is not None else [])

    @torch.inference_mode()
    def profile(self, rows: Sequence[Row]) -> Mapping[str, float]:
        """Compute all rows and return what share of the time each part of the forward pass took.

        Raises NotImplementedError where the model goes through transformers' own code.
        """
        if not isinstance(self._forward, Decoder):
            raise NotImplementedError("only a decoder tells its parts apart; use torch.profiler")
        return self._forward.profile(flatten(rows, self._model.block_tokens))
