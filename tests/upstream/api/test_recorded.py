"""Answers that real servers sent are read completely."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headrace.upstream.api.terms import Api
from headrace.v1 import generation_pb2 as pb
from tests.upstream.api.answering import calls_of, read, text_of
from tests.upstream.api.asking import WEATHER
from tests.upstream.api.recorded.reading import events_of

APIS: dict[str, Api] = {"gateway": "vllm", "vllm": "vllm", "llama_cpp": "llama.cpp"}  # by the server
# The name of the recording, and the fields of the request that asked for it.
STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"sampling": {"max_tokens": 8}}),
    ("logprobs", {"sampling": {"max_tokens": 3, "top_logprobs": 2, "logprobs": True}}),
    ("text", {"prompt": "One", "sampling": {"max_tokens": 5}}),
    ("text_logprobs", {"prompt": "One", "sampling": {"max_tokens": 3, "top_logprobs": 2}}),
    ("whole", {"sampling": {"max_tokens": 8}}),
    ("whole_text", {"prompt": "One", "sampling": {"max_tokens": 3, "top_logprobs": 1}}),
]


@pytest.mark.parametrize("server", APIS)
@pytest.mark.parametrize(
    ("name", "fields"), STREAMS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_answer_up_to_its_limit(server: str, name: str, fields: dict[str, Any]) -> None:
    reading, deltas, finish = read(events_of(f"{server}/{name}"), APIS[server], **fields)

    most = fields["sampling"]["max_tokens"]
    assert text_of(deltas)
    assert finish.reason == pb.FINISH_REASON_LENGTH
    assert reading.usage_known
    assert finish.usage.completion_tokens == most
    assert finish.usage.prompt_tokens > 0
    assert 0 < reading.tokens <= most
    if "logprobs" in name:
        assert reading.tokens == most
        assert b"".join(token.token.text for delta in deltas for token in delta.tokens).decode() == text_of(
            deltas
        )


@pytest.mark.parametrize("server", APIS)
def test_an_answer_up_to_a_stop_text(server: str) -> None:
    _, deltas, finish = read(events_of(f"{server}/stop_text"), APIS[server], sampling={"stop": ["e"]})

    assert text_of(deltas)
    assert "e" not in text_of(deltas)
    if server == "llama_cpp":  # which does not report the stop text
        assert finish.reason == pb.FINISH_REASON_STOP
    else:
        assert (finish.reason, finish.stop_sequence) == (pb.FINISH_REASON_STOP_SEQUENCE, "e")


@pytest.mark.parametrize("server", ["gateway", "vllm"])  # no call of llama.cpp's was recorded
def test_an_answer_that_calls_a_tool(server: str) -> None:
    _, deltas, finish = read(events_of(f"{server}/call"), APIS[server], chat={"tools": [WEATHER]})

    ((id, tool, arguments),) = calls_of(deltas)
    assert id
    assert tool == "get_weather"
    assert json.loads(arguments).keys() == {"city"}
    assert finish.reason == pb.FINISH_REASON_STOP
