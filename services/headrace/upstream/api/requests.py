"""Translate a request of the mesh to one of OpenAI's HTTP API, or reject what the upstream cannot do.

Nothing is left out that would change the answer: a field without a counterpart is rejected, with
`errors.FEATURE` where another tier may have it, so that a router asks that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace import errors
from headrace.quoting import quoted
from headrace.upstream.api.conversations import chat_body
from headrace.upstream.api.forms import form_body
from headrace.upstream.api.sampling import sampling_body
from headrace.upstream.api.terms import Terms, unsupported
from headrace.v1 import generation_pb2 as pb
from headrace.validation import check_request


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
    check_request(request)
    _check_names(request.routing, terms)
    _check_ids(request)
    sampling, chat = request.sampling, request.HasField("chat")
    body: dict[str, Any] = {"model": terms.model}
    if chat:
        body |= chat_body(request.chat, terms)
    else:
        body["prompt"] = request.prompt
    body |= sampling_body(sampling, terms, chat=chat)
    if sampling.WhichOneof("structured") is not None:
        body |= form_body(sampling, terms, chat=chat, tools=bool(request.chat.tools))
    if terms.api == "llama.cpp" and body.get("logprobs") and request.chat.tools:
        raise unsupported(
            "sampling.top_logprobs" if sampling.HasField("top_logprobs") else "sampling.logprobs"
        )
    most = most_tokens(request, terms)
    body["max_completion_tokens" if chat and terms.api == "openai" else "max_tokens"] = most
    body["stream"] = True
    body["stream_options"] = {"include_usage": True}
    if terms.api == "vllm":
        # The number of tokens so far with each event, which may contain several tokens.
        body["stream_options"]["continuous_usage_stats"] = True
    return HttpRequest("chat/completions" if chat else "completions", body)


def most_tokens(request: pb.GenerateRequest, terms: Terms) -> int:
    """Return the most tokens of the answer."""
    sampling = request.sampling
    return min(sampling.max_tokens, terms.max_tokens) if sampling.HasField("max_tokens") else terms.max_tokens


def _check_names(routing: pb.Routing, terms: Terms) -> None:
    if routing.tier and routing.tier != terms.tier:
        raise errors.UnknownTier(
            f"this server serves tier {terms.tier!r}, not {quoted(routing.tier)}", field="routing.tier"
        )
    if routing.model and routing.model != terms.model:
        raise errors.UnknownModel(
            f"tier {terms.tier!r} serves {terms.model!r}, not {quoted(routing.model)}", field="routing.model"
        )


def _check_ids(request: pb.GenerateRequest) -> None:
    """Reject what consists of token ids: the vocabulary of the upstream's model is not known here."""
    if request.HasField("token_ids"):
        raise unsupported("token_ids")
    if request.resume.token_ids:
        raise errors.InvalidRequest(
            "resume.token_ids is set, but the answers of this tier cannot be resumed, because a service "
            "outside of the mesh computes them: send the request again without resume",
            field="resume.token_ids",
        )
