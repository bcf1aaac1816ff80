"""Chat completions have OpenAI's shape, whole and as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from tests.gateway.fake_router import SCORE, TEXT, TOKENS, Edge
from tests.harness import eventually


def chunks_of(text: str) -> list[dict[str, Any]]:
    """Return the chunks of a stream, after a check of its framing."""
    assert text.endswith("data: [DONE]\n\n")
    events = [event for event in text.split("\n\n") if event]
    assert all(event.startswith("data: ") for event in events)
    chunks: list[dict[str, Any]] = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk["object"] == "chat.completion.chunk"
    assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    return chunks


async def test_a_whole_answer_has_openais_shape(plain: Edge) -> None:
    answer = (await plain.chat()).json()

    ChatCompletion.model_validate(answer, strict=True)
    assert answer.pop("id").startswith("chatcmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer.pop("system_fingerprint").startswith("fp_")
    headrace = answer.pop("headrace")
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 5,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    assert headrace.pop("answer_id").startswith("answer-")
    assert headrace.pop("request_id").startswith("chatcmpl-")
    assert headrace == {"tier": "small", "score": SCORE, "cost": 0.5}


async def test_the_headers_say_who_answered_and_what_it_cost(plain: Edge) -> None:
    response = await plain.chat(model="large")

    assert response.headers["x-headrace-tier"] == "large"
    assert response.headers["x-headrace-model"] == "big"
    assert response.headers["x-headrace-score"] == "0.2500"
    assert response.headers["x-headrace-cost"] == "0.5"
    assert response.headers["x-headrace-request-id"] == response.json()["id"]
    assert "x-headrace-ignored" not in response.headers


async def test_an_answer_without_a_price_has_no_cost(plain: Edge) -> None:
    plain.router.cost = None
    response = await plain.chat()

    assert "x-headrace-cost" not in response.headers
    assert response.json()["headrace"]["cost"] is None


async def test_a_stream_has_a_role_then_texts_then_a_reason(plain: Edge) -> None:
    response = await plain.chat(stream=True)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-headrace-tier"] == "small"
    chunks = chunks_of(response.text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [choice["delta"] for choice in choices[1:-1]] == [
        {"content": "Hello"},
        {"content": " "},
        {"content": "🚀"},
        {"content": "\n"},
    ]
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["stop"]
    assert all(choice["index"] == 0 and choice["logprobs"] is None for choice in choices)
    assert all("usage" not in chunk for chunk in chunks)
    assert all("headrace" not in chunk for chunk in chunks[:-1])
    assert chunks[-1]["headrace"]["cost"] == 0.5


async def test_a_stream_ends_with_the_usage_if_it_is_requested(plain: Edge) -> None:
    chunks = chunks_of((await plain.chat(stream=True, stream_options={"include_usage": True})).text)

    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("headrace" not in chunk for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 12
    assert chunks[-1]["headrace"]["tier"] == "small"


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_have_exact_bytes_and_readable_tokens(plain: Edge, stream: bool) -> None:
    plain.router.logprobs = (-0.25, float("-inf"), float("nan"), -10_000.0)
    response = await plain.chat(logprobs=True, top_logprobs=2, stream=stream)

    if stream:
        choices = [chunk["choices"][0] for chunk in chunks_of(response.text)]
        assert choices[0]["logprobs"] is None
        assert choices[-1]["logprobs"] is None
        content = [token for choice in choices[1:-1] for token in choice["logprobs"]["content"]]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
    else:
        ChatCompletion.model_validate(response.json(), strict=True)
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == [
        "Hello",
        " ",
        r"bytes:\xf0\x9f",
        r"bytes:\x9a\x80",
        "\n",
    ]
    assert [bytes(token["bytes"]) for token in content] == list(TOKENS)
    assert [token["logprob"] for token in content] == [-0.25, -9999.0, -9999.0, -9999.0, -0.5]
    assert content[0]["top_logprobs"] == [
        {"token": "Hello", "logprob": -0.25, "bytes": list(b"Hello")},
        {"token": "o", "logprob": -1.0, "bytes": [111]},
    ]


async def test_log_probabilities_come_without_alternatives_unless_requested(plain: Edge) -> None:
    content = (await plain.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]

    assert len(content) == len(TOKENS)
    assert all(token["top_logprobs"] == [] for token in content)


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_are_returned_as_in_vllm(plain: Edge, stream: bool) -> None:
    response = await plain.chat(return_token_ids=True, stream=stream)

    if stream:
        choices = [chunk["choices"][0] for chunk in chunks_of(response.text)]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
    else:
        choices = response.json()["choices"]
    assert [id for choice in choices for id in choice.get("token_ids", [])] == [100, 101, 102, 103, 104]
    assert all(choice["logprobs"] is None for choice in choices)


async def test_tokens_are_named_by_their_ids_as_in_vllm(plain: Edge) -> None:
    response = await plain.chat(logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)

    content = response.json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content[:2]] == ["token_id:100", "token_id:101"]
    assert content[0]["top_logprobs"][1]["token"] == "token_id:0"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reports", [True, False])
async def test_a_text_alone_has_null_for_ids_and_texts_for_tokens(
    plain: Edge, stream: bool, reports: bool
) -> None:
    """The service that computes it may report log-probabilities, and never ids."""
    plain.router.text_only = True
    if not reports:
        plain.router.deltas = [pb.Delta(token_count=1, text=TEXT)]
    asked: dict[str, Any] = {
        "logprobs": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    response = await plain.chat(stream=stream, **asked)

    if stream:
        choices = [chunk["choices"][0] for chunk in chunks_of(response.text)]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
    else:
        choices = response.json()["choices"]
        assert response.json()["usage"]["prompt_tokens"] == 7, "as its service reports at the end"
    assert {"token_ids": None}.items() <= choices[-2 if stream else -1].items()
    details = [choice["logprobs"] for choice in choices if choice.get("logprobs") is not None]
    tokens = [token["token"] for detail in details for token in detail["content"]]
    assert tokens == (["Hello", " ", "bytes:\\xf0\\x9f", "bytes:\\x9a\\x80", "\n"] if reports else [])
    assert bool(details) == reports


@pytest.mark.parametrize("stream", [False, True])
async def test_the_loss_of_a_text_alone_is_an_error_of_a_gateway(plain: Edge, stream: bool) -> None:
    plain.router.text_only, plain.router.breaks = True, errors.UpstreamLost("it broke off")
    response = await plain.chat(stream=stream)

    assert response.status_code == (200 if stream else 502)
    last = response.text.strip().split("\n\n")[-1].removeprefix("data: ")
    error = json.loads(last)["error"]
    assert (error["code"], error["message"]) == ("upstream_lost", "it broke off")
    assert ('"Hello"' in response.text) == stream
    assert len(plain.router.requests) == 1


async def test_further_choices_of_a_text_alone_are_pinned_to_its_model(plain: Edge) -> None:
    plain.router.text_only = True
    response = await plain.chat(n=3)

    assert [choice["message"]["content"] for choice in response.json()["choices"]] == [TEXT] * 3
    assert response.json()["usage"]["prompt_tokens"] == 7
    assert {(request.routing.tier, request.routing.model) for request in plain.router.requests[1:]} == {
        ("small", "tiny")
    }


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (pb.FINISH_REASON_STOP, "stop"),
        (pb.FINISH_REASON_STOP_SEQUENCE, "stop"),
        (pb.FINISH_REASON_LENGTH, "length"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_finish_reason_is_openais(
    plain: Edge, reason: pb.FinishReason.ValueType, expected: str, stream: bool
) -> None:
    plain.router.reason = reason
    response = await plain.chat(stream=stream)

    answer = chunks_of(response.text)[-1] if stream else response.json()
    assert answer["choices"][0]["finish_reason"] == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_the_stop_text_is_reported_and_part_of_the_answer_if_requested(
    plain: Edge, stream: bool
) -> None:
    plain.router.reason = pb.FINISH_REASON_STOP_SEQUENCE
    plain.router.stop_sequence = "END\n"
    without = await plain.chat(stop="END\n", stream=stream)
    with_it = await plain.chat(stop="END\n", stream=stream, include_stop_str_in_output=True)

    texts = []
    for response in (without, with_it):
        if stream:
            choices = [chunk["choices"][0] for chunk in chunks_of(response.text)]
            texts.append("".join(choice["delta"].get("content", "") for choice in choices))
        else:
            choices = response.json()["choices"]
            texts.append(choices[0]["message"]["content"])
        assert choices[-1]["stop_reason"] == "END\n"
    assert texts == [TEXT, TEXT + "END\n"]


async def test_texts_that_json_must_escape_arrive_unchanged(plain: Edge) -> None:
    tokens = (b'"\\', b"\x00\x1f\r\n", "\u2028\u2029".encode(), b"</script>", b"\x7f")
    plain.router.tokens = tokens
    whole = await plain.chat()
    streamed = await plain.chat(stream=True)

    expected = b"".join(tokens).decode()
    assert whole.json()["choices"][0]["message"]["content"] == expected
    chunks = chunks_of(streamed.text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_answer_has_a_status_of_its_own(plain: Edge, stream: bool) -> None:
    plain.router.refuses = errors.Overloaded("queue is full", retry_after=2.0)
    response = await plain.chat(stream=stream)

    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["code"] == "queue_full"


async def test_an_error_within_a_stream_ends_it_without_done(plain: Edge) -> None:
    plain.router.breaks = errors.SequenceFault("the engine failed")
    response = await plain.chat(stream=True)

    assert response.status_code == 200
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert json.loads(events[-2])["choices"][0]["delta"] == {"content": "Hello"}
    assert json.loads(events[-1])["error"]["message"] == "the engine failed"


async def test_an_error_within_a_whole_answer_is_the_response(plain: Edge) -> None:
    plain.router.breaks = errors.SequenceFault("the engine failed")
    response = await plain.chat()

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "sequence_fault"


async def test_an_error_of_the_mesh_names_the_callers_parameter(plain: Edge) -> None:
    error = errors.InvalidSampling("sampling.max_tokens is too large", field="sampling.max_tokens")
    plain.router.refuses = error
    old = await plain.chat(max_tokens=5)
    new = await plain.chat(max_tokens=5, max_completion_tokens=6)

    assert old.json()["error"]["param"] == "max_tokens"
    assert new.json()["error"]["message"] == "max_completion_tokens is too large"
    assert new.json()["error"]["param"] == "max_completion_tokens"


async def test_leaving_a_stream_cancels_its_request(plain: Edge) -> None:
    # Never set: the answer ends with its caller only.
    plain.router.gate = asyncio.Event()
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    async with plain.http.stream("POST", "/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if "Hello" in line:
                break

    await eventually(lambda: plain.router.active == 0)
