"""The engine with a model: a `Forward` computes logits over paged KV memory, `sampling` samples from them.

It computes on the calling thread, on the CPU; the engine of a GPU is `gpu.engine`. `load.loading` makes these
engines from files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from headrace.worker.engine.cpu.decoder import Decoder
from headrace.worker.engine.flat_step import flatten
from headrace.worker.engine.forward import Forward
from headrace.worker.engine.interface import DeferredStep, Fault, ModelInfo, Result, Row, Token
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
        self._sampler = Sampler(model.eos_ids)

    @property
    def model(self) -> ModelInfo:
        """The loaded model; constant."""
        return self._model

    @property
    def ahead(self) -> int:
        """0: it computes on the calling thread."""
        return 0

    def launch(self, rows: Sequence[Row]) -> DeferredStep:
        """See `Engine.launch`."""
        return DeferredStep(self.step, rows)

    def step(self, rows: Sequence[Row]) -> list[Result]:
        """Compute all rows now. Returns what `LaunchedStep.wait` does.

        A row whose logits are not finite gets a Fault. Other errors, such as too little memory, are raised.
        """
        computed = self.compute(rows)
        results: list[Result] = [None] * len(rows)
        for index, token in zip(computed.sampling, computed.tokens, strict=True):
            results[index] = token
        return results

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row]) -> Computed:
        """Compute all rows as `step` does, and return the logits too."""
        flat = flatten(rows, self._model.block_tokens)
        logits = self._forward(flat)
        sampling: list[int] = flat.sampling.tolist()
        tokens = self._sampler.sample(logits, [rows[i] for i in sampling]) if sampling else []
        return Computed(sampling, logits, tokens)

    @torch.inference_mode()
    def profile(self, rows: Sequence[Row]) -> Mapping[str, float]:
        """Compute all rows and return the share of time of each part of the forward pass.

        Raises NotImplementedError if the model runs through transformers' own code.
        """
        if not isinstance(self._forward, Decoder):
            raise NotImplementedError("only a Decoder can be profiled by part; use torch.profiler")
        return self._forward.profile(flatten(rows, self._model.block_tokens))
