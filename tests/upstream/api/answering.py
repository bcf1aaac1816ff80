"""Read answers, and check them as a router does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from headrace.router.answering.replies import check_calls, check_delta, check_tokens
from headrace.upstream.api.events import AnswerReader
from headrace.upstream.api.terms import Api
from headrace.v1 import generation_pb2 as pb
from tests.upstream.api.asking import asked, terms


def chunk(*, finish: object = None, choice: dict[str, Any] | None = None, **delta: Any) -> dict[str, Any]:
    """An event of a chat completion."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **(choice or {})}]}


def call(index: int | None = 0, id: str | None = None, name: str | None = None, arguments: Any = None) -> Any:
    """A part of a call; without what is None."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    part = {"index": index, "id": id, "function": function}
    return {key: value for key, value in part.items() if value is not None}


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """The usage in an event."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def reader(api: Api = "openai", key: str = "", most: int = 100, **fields: Any) -> AnswerReader:
    """A reader of the answer to a request with these fields, from a tier with at most *most* tokens."""
    return AnswerReader(asked(**fields), terms(api, max_tokens=most), key=key)


def read(
    events: Iterable[object], api: Api = "openai", most: int = 100, **fields: Any
) -> tuple[AnswerReader, list[pb.Delta], pb.Finish]:
    """Read an answer to its end, and check it."""
    reading = reader(api, most=most, **fields)
    deltas = [delta for event in events for delta in reading.read(event)]
    finish = reading.finish()
    check(deltas, asked(**fields))
    return reading, deltas, finish


def check(deltas: Sequence[pb.Delta], request: pb.GenerateRequest) -> None:
    """Check the deltas of an answer as a router does."""
    sampling = request.sampling
    most = sampling.max_tokens if sampling.HasField("max_tokens") else math.inf
    had, begun = 0, 0
    for delta in deltas:
        assert delta.offset == had
        check_delta(delta, had, most)
        begun = check_calls(delta, begun) or 0
        if sampling.HasField("top_logprobs"):
            check_tokens(delta, sampling.top_logprobs)
        else:
            assert not delta.tokens
        if not sampling.logprobs:
            assert not delta.logprobs
        had += delta.token_count


def text_of(deltas: Iterable[pb.Delta]) -> str:
    """The text of an answer."""
    return "".join(delta.text for delta in deltas)


def reasoning_of(deltas: Iterable[pb.Delta]) -> str:
    """What the model thinks in an answer."""
    return "".join(delta.reasoning for delta in deltas)


def calls_of(deltas: Iterable[pb.Delta]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call in an answer."""
    calls: list[tuple[str, str, str]] = []
    for part in (part for delta in deltas for part in delta.tool_calls):
        if part.id:
            calls.append((part.id, part.name, part.arguments))
        else:
            calls[part.index] = (*calls[part.index][:2], calls[part.index][2] + part.arguments)
    return calls
