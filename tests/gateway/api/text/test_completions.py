"""Text completions have OpenAI's shape, whole and as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import openai
import pytest
from openai.types import Completion

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from tests.gateway.api.text.text_router import NAME, SPECIAL, TextEdge, text_edge
from tests.gateway.fake_router import SCORE, TEXT, TOKENS

COUNT = len(TOKENS)


async def _streamed(edge: TextEdge, **parameters: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream, read with OpenAI's package."""
    stream = await edge.sdk.completions.create(
        **{"model": "auto", "prompt": "Hi", "stream": True, **parameters}
    )
    return [chunk.to_dict() async for chunk in stream]


def _texts(chunks: list[dict[str, Any]], choices: int) -> list[str]:
    found = [""] * choices
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] += choice["text"]
    return found


def _joined(chunks: list[dict[str, Any]], index: int) -> dict[str, list[Any]]:
    """Return the log-probabilities of a choice, joined."""
    joined: dict[str, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index and choice["logprobs"]:
                for name, values in choice["logprobs"].items():
                    joined.setdefault(name, []).extend(values)
    return joined


async def test_a_whole_answer_has_openais_shape(edge: TextEdge) -> None:
    answer = (await edge.complete()).json()

    Completion.model_validate(answer, strict=True)
    assert answer.pop("id").startswith("cmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer.pop("system_fingerprint").startswith("fp_")
    headrace = answer.pop("headrace")
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": COUNT,
            "total_tokens": 2 + COUNT,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    assert headrace["tier"] == "small"
    assert headrace["score"] == SCORE


async def test_the_synchronous_package_reads_whole_answers_and_streams(edge: TextEdge) -> None:
    def read() -> tuple[str, str]:
        with openai.OpenAI(base_url=str(edge.sdk.base_url), api_key="none", max_retries=0) as sdk:
            whole = sdk.completions.create(model="auto", prompt="Hi")
            stream = sdk.completions.create(model="auto", prompt="Hi", stream=True)
            return whole.choices[0].text, "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(read) == (TEXT, TEXT)


async def test_a_stream_has_texts_then_a_reason(edge: TextEdge) -> None:
    chunks = await _streamed(edge)

    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Hello", " ", "🚀", "\n", ""]
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [("headrace" in chunk) for chunk in chunks] == [False] * 4 + [True]
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_stream_ends_with_the_usage_if_it_is_requested(edge: TextEdge) -> None:
    chunks = await _streamed(edge, prompt=["Hi", "Ho!"], stream_options={"include_usage": True})

    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == 5
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * COUNT
    assert chunks[-1]["headrace"]["tier"] == "small"


async def test_the_defaults_are_openais(edge: TextEdge) -> None:
    await edge.complete()

    assert edge.asked.prompt == "Hi"
    edge.asked.sampling.ClearField("seed")  # which the gateway draws to be able to resume the answer
    assert edge.asked.sampling == pb.Sampling(max_tokens=16)


async def test_the_parameters_reach_the_mesh(edge: TextEdge) -> None:
    await edge.complete(max_tokens=9, temperature=0, seed=5, stop=["a", "b"], logprobs=3, model="large")

    assert edge.asked.sampling == pb.Sampling(
        max_tokens=9, temperature=0, seed=5, stop=["a", "b"], top_logprobs=3
    )
    assert edge.asked.routing.tier == "large"


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_have_choices_in_their_order(edge: TextEdge, stream: bool) -> None:
    """The choices of the first prompt come first."""
    prompts = ["a", "bb", "ccc"]
    if stream:
        texts = _texts(await _streamed(edge, prompt=prompts, n=2, echo=True), 6)
    else:
        choices = (await edge.complete(prompt=prompts, n=2, echo=True)).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(6))
        texts = [choice["text"] for choice in choices]

    assert texts == [prompt + TEXT for prompt in prompts for _ in range(2)]
    assert sorted(request.prompt for request in edge.router.requests) == sorted(prompts * 2)
    assert len({request.request_id for request in edge.router.requests}) == 6


async def test_a_prompt_of_token_ids_is_passed_on_to_the_model_that_is_named(edge: TextEdge) -> None:
    response = await edge.complete(prompt=[72, 105], model="tiny")

    assert response.status_code == 200
    assert list(edge.asked.token_ids.ids) == [72, 105]
    assert edge.asked.routing.model == "tiny"


async def test_token_ids_without_a_model_are_refused_if_there_are_several(edge: TextEdge) -> None:
    """Ids are valid for one model only."""
    with pytest.raises(openai.BadRequestError) as raised:
        await edge.sdk.completions.create(model="auto", prompt=[[72, 105]])

    assert raised.value.param == "model"
    assert "set model to one of 'small', 'large'" in raised.value.message
    assert not edge.router.requests


async def test_token_ids_without_a_model_are_for_the_only_one() -> None:
    async with text_edge(small="tiny", other="tiny") as edge:
        response = await edge.complete(prompt=[72, 105])

    assert response.json()["choices"][0]["text"] == TEXT
    assert edge.asked.routing.model == "tiny"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_an_echo_has_the_log_probabilities_of_the_prompt(edge: TextEdge, stream: bool, n: int) -> None:
    """The prompt comes first, its first token without a log-probability; every choice has it."""
    asked: dict[str, Any] = {"prompt": ["xyz", "é"], "echo": True, "logprobs": 1, "n": n}
    if stream:
        chunks = await _streamed(edge, **asked)
        texts = _texts(chunks, 2 * n)
        details = [_joined(chunks, index) for index in range(2 * n)]
    else:
        choices = (await edge.complete(**asked)).json()["choices"]
        texts = [choice["text"] for choice in choices]
        details = [choice["logprobs"] for choice in choices]

    assert texts == [f"xyz{TEXT}"] * n + [f"é{TEXT}"] * n
    answer = ["Hello", " ", r"bytes:\xf0\x9f", r"bytes:\x9a\x80", "\n"]
    for index in range(n):
        assert details[index] == {
            "tokens": ["x", "y", "z", *answer],
            "token_logprobs": [None, -0.25, -0.5] + [-0.5] * COUNT,
            "top_logprobs": [None, {"@": -0.125, "y": -0.25}, {"@": -0.125, "z": -0.5}]
            + [{token: -0.5} for token in answer],
            "text_offset": [0, 1, 2, 3, 8, 9, 9, 10],
        }
        assert details[n + index]["tokens"] == [r"bytes:\xc3", r"bytes:\xa9", *answer]
        assert details[n + index]["text_offset"] == [0, 0, 1, 6, 7, 7, 8]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_of_token_ids_is_their_text(edge: TextEdge, stream: bool) -> None:
    """Special tokens appear by their names, and offsets after them are right."""
    prompts = [[SPECIAL, 72, 105], [72]]
    asked: dict[str, Any] = {"prompt": prompts, "model": "tiny", "echo": True, "logprobs": 0}
    if stream:
        chunks = await _streamed(edge, **asked)
        texts, details = _texts(chunks, 2), [_joined(chunks, 0), _joined(chunks, 1)]
    else:
        choices = (await edge.complete(**asked)).json()["choices"]
        texts, details = [choice["text"] for choice in choices], [choice["logprobs"] for choice in choices]

    assert texts == [f"{NAME}Hi{TEXT}", f"H{TEXT}"]
    assert details[0]["tokens"][:3] == ["", "H", "i"]
    assert details[0]["text_offset"][3] == len(NAME) + 2
    assert details[1]["top_logprobs"][0] is None
    assert {call.tokenizer.model for call in edge.router.calls} == {"tiny"}


@pytest.mark.parametrize("stream", [False, True])
async def test_no_tokens_and_an_echo_return_the_prompt_alone(edge: TextEdge, stream: bool) -> None:
    asked: dict[str, Any] = {"prompt": "xyz", "echo": True, "logprobs": 1, "max_tokens": 0}
    if stream:
        chunks = await _streamed(edge, **asked, stream_options={"include_usage": True})
        [text], details, usage = _texts(chunks, 1), _joined(chunks, 0), chunks[-1]["usage"]
        reason = chunks[-2]["choices"][0]["finish_reason"]
    else:
        answer = (await edge.complete(**asked)).json()
        [choice] = answer["choices"]
        text, details, usage, reason = (
            choice["text"],
            choice["logprobs"],
            answer["usage"],
            choice["finish_reason"],
        )

    assert text == "xyz"
    assert details["token_logprobs"] == [None, -0.25, -0.5]
    assert usage["completion_tokens"] == 0
    assert reason == "length"
    assert edge.asked.sampling.max_tokens == 1


async def test_a_scored_prompt_is_followed_by_exactly_one_token(edge: TextEdge) -> None:
    """Harnesses leave the last token out, so one that ends the turn counts, too."""
    await edge.complete(echo=True, logprobs=1, max_tokens=1)
    assert edge.asked.sampling.ignore_eos
    assert edge.asked.sampling.prompt_logprobs == edge.asked.sampling.top_logprobs == 1

    others: list[dict[str, Any]] = [
        {"echo": True, "max_tokens": 1},
        {"logprobs": 1, "max_tokens": 1},
        {"echo": True, "logprobs": 1},
    ]
    for other in others:
        await edge.complete(**other)
        assert not edge.asked.sampling.ignore_eos


async def test_an_echo_without_log_probabilities_does_not_request_them(edge: TextEdge) -> None:
    response = await edge.complete(echo=True)

    assert response.json()["choices"][0]["text"] == "Hi" + TEXT
    assert response.json()["choices"][0]["logprobs"] is None
    assert not edge.asked.sampling.HasField("prompt_logprobs")
    assert not edge.asked.sampling.HasField("top_logprobs")


@pytest.mark.parametrize("stream", [False, True])
async def test_vllms_additions_are_in_the_choices(edge: TextEdge, stream: bool) -> None:
    edge.router.reason, edge.router.stop_sequence = pb.FINISH_REASON_STOP_SEQUENCE, "END"
    asked: dict[str, Any] = {
        "logprobs": 0,
        "extra_body": {
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "include_stop_str_in_output": True,
        },
    }
    if stream:
        chunks = await _streamed(edge, **asked)
        [text], tokens = _texts(chunks, 1), _joined(chunks, 0)["tokens"]
        ids = [id for chunk in chunks for id in chunk["choices"][0].get("token_ids", [])]
        last = chunks[-1]["choices"][0]
    else:
        completion = await edge.sdk.completions.create(model="auto", prompt="Hi", **asked)
        last = completion.to_dict()["choices"][0]
        text, tokens, ids = last["text"], last["logprobs"]["tokens"], last["token_ids"]

    assert text == TEXT + "END"
    assert ids == [100, 101, 102, 103, 104]
    assert tokens == [f"token_id:{id}" for id in ids]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "END")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reports", [True, False])
async def test_a_text_alone_has_null_for_ids_and_texts_for_tokens(
    edge: TextEdge, stream: bool, reports: bool
) -> None:
    edge.router.text_only = True
    if not reports:
        edge.router.deltas = [pb.Delta(token_count=1, text=TEXT)]
    asked = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    body = {"model": "auto", "prompt": "Hi", "logprobs": 0, "stream": stream, **asked}
    response = await edge.http.post("/v1/completions", json=body)

    if stream:
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
        choices = [json.loads(line)["choices"][0] for line in lines if line.startswith("{")]
    else:
        choices = response.json()["choices"]
    assert choices[0]["token_ids"] is None
    details = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    assert [token for detail in details for token in detail["tokens"]][:2] == ["Hello", " "][: 2 * reports]
    assert "".join(choice["text"] for choice in choices) == TEXT


@pytest.mark.parametrize(
    ("parameters", "param", "words"),
    [
        ({"prompt": None}, "prompt", "prompt is null, must be a text"),
        ({"prompt": []}, "prompt", "prompt is an empty list"),
        ({"prompt": ["x", 1]}, "prompt", "prompt [1] is a number, but [0] is a text"),
        ({"prompt": [1, -1]}, "prompt", "prompt has -1 at 1"),
        ({"prompt": ["x"] * 129}, "prompt", "at most 128"),
        ({"prompt": ["x"] * 65, "n": 2}, "n", "130 answers, must be at most 128"),
        ({"n": 0}, "n", "at least 1"),
        ({"best_of": 3}, "best_of", "must be equal to n, which is 1"),
        ({"best_of": 1, "n": 2}, "best_of", "must be equal to n, which is 2"),
        ({"suffix": "x"}, "suffix", "suffix is not supported"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"logprobs": -1}, "logprobs", "at least 0"),
        ({"logprobs": True}, "logprobs", "must be an integer"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"echo": 1}, "echo", "must be true or false"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "use echo with logprobs"),
        ({"response_format": {"type": "json"}}, "response_format.type", "must be 'text', 'json_object' or"),
        ({"temperature": 11}, "temperature", "temperature is 11, must be 0 to 10"),
        ({"min_tokens": 20}, "min_tokens", "must be at most max_tokens"),
        ({"model": "nobody"}, "model", "the model 'nobody' does not exist"),
    ],
)
async def test_what_is_wrong_is_said_in_openais_shape(
    edge: TextEdge, parameters: dict[str, Any], param: str, words: str
) -> None:
    response = await edge.complete(**parameters)

    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not edge.router.requests


@pytest.mark.parametrize(
    "parameters",
    [
        {"best_of": 2, "n": 2},
        {"best_of": 1},
        {"suffix": ""},
        {"suffix": None},
        {"response_format": {"type": "text"}},
        {"logprobs": None},
        {"echo": False},
        {"stop": None},
        {"add_special_tokens": True},
    ],
)
async def test_values_that_request_nothing_are_accepted(edge: TextEdge, parameters: dict[str, Any]) -> None:
    response = await edge.complete(**parameters)

    assert response.status_code == 200
    assert "x-headrace-ignored" not in response.headers


async def test_ignored_parameters_are_named_in_a_header(edge: TextEdge) -> None:
    response = await edge.complete(store=True, later=1)

    assert response.headers["x-headrace-ignored"] == "store, later"


async def test_an_error_of_the_mesh_has_its_status(edge: TextEdge) -> None:
    edge.router.refuses = errors.ContextTooLong("the prompt has 9 tokens", field="token_ids")
    response = await edge.complete(prompt=[1, 2], model="small")

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == "prompt"


async def test_the_failure_of_one_prompt_is_that_of_all(edge: TextEdge) -> None:
    edge.router.refuses, edge.router.failing = errors.Overloaded("full"), 1
    response = await edge.complete(prompt=["a", "b", "c"])

    assert response.status_code == 429
