"""What the requests to an upstream depend on, and the errors for what it cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from headrace import errors

Api: TypeAlias = Literal["openai", "vllm", "llama.cpp"]
APIS: tuple[Api, ...] = ("openai", "vllm", "llama.cpp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the requests to an upstream depend on.

    tier         the name of the tier in the mesh
    model        the name of the model, in the mesh and at the upstream
    api          which parameters the upstream knows beyond those of OpenAI's API
    max_tokens   most tokens of an answer; a request may ask for fewer
    """

    tier: str
    model: str
    api: Api = "openai"
    max_tokens: int = 1024


def lacks(field: str, reason: str) -> errors.InvalidRequest:
    """Return the error for a field that the upstream does not support, and another tier may.

    field    of the request, such as "sampling.top_k"
    reason   follows the field in the message, such as "is set, but ..."
    """
    kind = errors.InvalidSampling if field.startswith("sampling.") else errors.InvalidRequest
    return kind(
        f"{field} {reason}: leave it out, or use another tier",
        field=field,
        feature=field.rpartition(".")[2],  # see `errors.FEATURE`
    )


def unsupported(field: str) -> errors.InvalidRequest:
    """Return the error for a field without a counterpart in the upstream's API."""
    return lacks(field, "is set, but the service behind this tier does not support it")
