"""Draw tokens inside vLLM: the logits processor that its engine core loads by name.

For each sequence that `sampling` hands over, it makes the token that `worker.engine.drawing` draws the only
possible one. All other rows stay as they are, and a batch without such sequences takes no time.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from headrace.worker.engine.drawing.batch import Drawn, DrawnBatch
from headrace.worker.engine.load.vocabulary import VocabularyReader
from headrace.worker.vllm.drawing.end_ids import end_ids
from headrace.worker.vllm.drawing.handover import unpacked

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

log = logging.getLogger(__name__)

NAME = f"{__name__}:DrawingProcessor"  # for vLLM
CACHE = "headrace_cache"  # in vLLM's additional_config: the folder for parsed tokenizers


class DrawingProcessor(LogitsProcessor):  # type: ignore[misc]
    """Draws the tokens of the sequences that are handed over."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        model: Any = vllm_config.model_config
        eos_ids = end_ids(model, log.warning)
        reader = VocabularyReader(Path(model.model), Path(dict(vllm_config.additional_config)[CACHE]))
        reader.make(size=int(model.get_vocab_size()), eos_ids=eos_ids)
        self._batch = DrawnBatch(eos_ids, device, cache(lambda: reader.grammars(log.warning)))

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what cannot be unpacked: it would end the engine core."""
        try:
            unpacked(sampling_params.extra_args)
        except (KeyError, TypeError, ValueError) as error:
            raise VLLMValidationError(f"extra_args of another version: {error!r}") from error

    def is_argmax_invariant(self) -> bool:
        """Return False: vLLM takes the likeliest token, which this changes."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the changes of vLLM's batch."""
        if batch_update is None:
            return
        batch = self._batch
        for row in batch_update.removed:
            batch.remove(row)
        for row, params, prompt, answer in batch_update.added:
            batch.remove(row)
            own = unpacked(params.extra_args)
            if own is not None and prompt is not None:
                batch.put(row, Drawn(own[0], own[1], prompt, answer))
        for source, target, direction in batch_update.moved:
            batch.move(source, target, swap=direction == MoveDirectionality.SWAP)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change the rows of sequences that are drawn here."""
        return self._batch.draw(logits)
