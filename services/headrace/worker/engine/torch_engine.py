"""The engine with a model: a `Forward` computes logits over paged KV memory, `sampling` samples from them.

It computes on the calling thread, on the CPU; the engine of a GPU is `gpu.engine`. `load.loading` makes these
engines from files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from headrace.worker.engine.cpu.decoder import Decoder
from headrace.worker.engine.drawing.verification import sample_rows
from headrace.worker.engine.flat_step import FlatStep, flatten
from headrace.worker.engine.forward import Forward
from headrace.worker.engine.interface import (
    DeferredStep,
    Fault,
    Grammars,
    ModelInfo,
    PromptLogprobs,
    Result,
    Row,
    Token,
)
from headrace.worker.engine.likelihoods import (
    add_prompts,
    joined,
    likelihoods,
    most_of_prompts,
    prompt_parts,
    scored_ids,
)
from headrace.worker.engine.sampling import Sampler

# Tokens of a prompt whose logits are in memory at the same time: 40 MB with a vocabulary of 152,000.
SCORED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Computed:
    """The results of a step, with its logits.

    sampling   indices of the rows that sampled
    logits     [sampled, vocabulary], in the model's dtype; the next step may overwrite them
    tokens     one per sampling row
    prompts    the parts of prompts that were scored, by the index of the row
    """

    sampling: list[int]
    logits: torch.Tensor
    tokens: list[Token | Fault]
    prompts: Mapping[int, PromptLogprobs | Fault] = field(default_factory=dict)


class TorchEngine:
    """Computes steps of one model.

    forward    the model and its KV memory, of at least model.kv_blocks blocks
    model      its description
    grammars   of the model's vocabulary; None to support none
    """

    def __init__(self, forward: Forward, model: ModelInfo, grammars: Grammars | None = None) -> None:
        self._forward = forward
        self._model = model
        self.grammars = grammars
        self._sampler = Sampler(model.eos_ids, grammars)

    @property
    def model(self) -> ModelInfo:
        """The loaded model; constant."""
        return self._model

    @property
    def ahead(self) -> int:
        """0: it computes on the calling thread."""
        return 0

    @property
    def verifies_drafts(self) -> bool:
        """Whether rows may have a `draft`: only where more tokens in a step do not change a row's bits."""
        return self._model.exact

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
        add_prompts(results, computed.prompts)
        return results

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row]) -> Computed:
        """Compute all rows as `step` does, and return the logits too."""
        flat = flatten(rows, self._model.block_tokens)
        logits = self._forward(flat)
        sampling = [index for index, row in enumerate(rows) if row.sample]
        tokens = sample_rows(self._sampler.sample, logits, [rows[i] for i in sampling]) if sampling else []
        prompts = self._score(flat, rows) if len(flat.scored) else {}
        return Computed(sampling, logits, tokens, prompts)

    def _score(self, flat: FlatStep, rows: Sequence[Row]) -> dict[int, PromptLogprobs | Fault]:
        """Compute the log-probabilities of prompts, in slices, because their logits take much memory."""
        ids, most = scored_ids(rows), most_of_prompts(rows)
        return prompt_parts(
            rows,
            joined(
                [
                    likelihoods(
                        self._forward.logits_of(flat.scored[begin : begin + SCORED_TOKENS]),
                        ids[begin : begin + SCORED_TOKENS],
                        most,
                    )
                    for begin in range(0, len(ids), SCORED_TOKENS)
                ]
            ),
        )

    @torch.inference_mode()
    def profile(self, rows: Sequence[Row]) -> Mapping[str, float]:
        """Compute all rows and return the share of time of each part of the forward pass.

        Raises NotImplementedError if the model runs through transformers' own code.
        """
        if not isinstance(self._forward, Decoder):
            raise NotImplementedError("only a Decoder can be profiled by part; use torch.profiler")
        return self._forward.profile(flatten(rows, self._model.block_tokens))
