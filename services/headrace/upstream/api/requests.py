"""Translate a request of the mesh to one of OpenAI's HTTP API, or reject what the upstream cannot do.

Nothing is left out that would change the answer: a field without a counterpart is rejected, with
`errors.FEATURE` where another tier may have it, so that a router asks that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from headrace.v1 import generation_pb2 as pb

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


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request to an upstream.

    path   to append to the base URL, without a slash at its start: "chat/completions" or "completions"
    body   JSON, of plain values
    """

    path: str
    body: dict[str, Any]


def to_http(request: pb.GenerateRequest, terms: Terms) -> HttpRequest:
    """Return the HTTP request that asks for the same answer, as a stream.

    Checks the request first (`headrace.validation.check_request`), and the names of tier and model in it.
    Takes milliseconds for requests of megabytes: call it in a thread for these.

    Raises InvalidRequest for an invalid request, and for one that the upstream cannot answer as requested.
    """
    raise NotImplementedError


def most_tokens(request: pb.GenerateRequest, terms: Terms) -> int:
    """Return the most tokens of the answer."""
    raise NotImplementedError
