"""Read the ids that end a turn from the configuration of a model that vLLM has loaded.

Both the worker and the logits processor in vLLM's engine core read them here: for both, a structured answer
must end with the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from headrace.worker.engine.load.identity import read_eos_ids


def end_ids(model: Any, warn: Callable[[str], None]) -> frozenset[int]:
    """Return the ids of the tokens that end a turn, all of them in the vocabulary.

    model   vLLM's ModelConfig of a local folder
    warn    receives a sentence about each id that cannot be used
    """
    generation = SimpleNamespace(**(model.try_get_generation_config() or {}))
    return read_eos_ids(
        Path(model.model),
        [generation, model.hf_text_config],
        vocabulary=int(model.get_vocab_size()),
        warn=warn,
    )
