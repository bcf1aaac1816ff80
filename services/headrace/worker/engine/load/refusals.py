"""Why a model cannot be served: every reason that `loading` gives for not starting.

The messages are for the person who starts the worker and say what to do instead.
"""

from __future__ import annotations

INSTEAD = "see docs/models.md for the architectures that are served"


class LoadingError(Exception):
    """The model cannot be loaded as asked: wrong path, device, dtype or context length, or a damaged file."""


class UnsupportedModel(LoadingError):
    """The model is readable, but this engine would not compute it right."""


def own_attention(network: object, why: str = "") -> UnsupportedModel:
    """Make the refusal of a network whose attention layers cannot use our memory.

    why   more on it, such as how many of its layers
    """
    return UnsupportedModel(
        f"{type(network).__name__} computes attention in code of its own{why}, which cannot use "
        f"Headrace's paged KV memory; serve it with transformers or vLLM, or another model here: {INSTEAD}"
    )
