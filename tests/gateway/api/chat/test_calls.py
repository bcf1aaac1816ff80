"""Calls of tools and reasoning in answers have OpenAI's and vLLM's shape, whole and as a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from headrace.v1 import generation_pb2 as pb
from tests.gateway.api.chat.test_answers import chunks_of
from tests.gateway.fake_router import Edge

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "weather"}}


def delta(*calls: pb.ToolCallDelta, text: str = "", reasoning: str = "", tokens: int = 1) -> pb.Delta:
    return pb.Delta(token_count=tokens, text=text, reasoning=reasoning, tool_calls=calls)


def begins(index: int, arguments: str = "") -> pb.ToolCallDelta:
    return pb.ToolCallDelta(index=index, id=f"call_{index}", name="weather", arguments=arguments)


def continues(index: int, arguments: str) -> pb.ToolCallDelta:
    return pb.ToolCallDelta(index=index, arguments=arguments)


ARGUMENTS = ['{"in": "Köln"}', "{}"]
CALLS = [
    delta(begins(0)),
    delta(continues(0, '{"in": ')),
    delta(continues(0, '"Köln"}')),
    delta(),
    delta(begins(1, "{"), tokens=3),
    delta(continues(1, "}")),
]
# The same, gathered under load.
GATHERED = [
    delta(begins(0)),
    delta(continues(0, '{"in": "Köln"}'), begins(1), continues(1, "{}"), tokens=7),
]


def whole_call(index: int) -> dict[str, Any]:
    function = {"name": "weather", "arguments": ARGUMENTS[index]}
    return {"id": f"call_{index}", "type": "function", "function": function}


def first_part(index: int) -> dict[str, Any]:
    function = {"name": "weather", "arguments": ""}
    return {"index": index, "id": f"call_{index}", "type": "function", "function": function}


def next_part(index: int, arguments: str) -> dict[str, Any]:
    return {"index": index, "function": {"arguments": arguments}}


@pytest.mark.parametrize("deltas", [CALLS, GATHERED], ids=["tokens", "gathered"])
async def test_a_whole_answer_has_its_calls_and_no_content(plain: Edge, deltas: list[pb.Delta]) -> None:
    plain.router.deltas = deltas
    answer = (await plain.chat(tools=[WEATHER])).json()

    ChatCompletion.model_validate(answer, strict=True)
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "tool_calls": [whole_call(0), whole_call(1)],
    }
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("deltas", "parts"),
    [
        (
            CALLS,
            [
                first_part(0),
                next_part(0, '{"in": '),
                next_part(0, '"Köln"}'),
                first_part(1),
                next_part(1, "{"),
                next_part(1, "}"),
            ],
        ),
        (
            GATHERED,
            [first_part(0), next_part(0, ARGUMENTS[0]), first_part(1), next_part(1, ARGUMENTS[1])],
        ),
    ],
    ids=["tokens", "gathered"],
)
async def test_a_stream_has_a_chunk_for_each_part_of_a_call(
    plain: Edge, deltas: list[pb.Delta], parts: list[dict[str, Any]]
) -> None:
    plain.router.deltas = deltas
    chunks = chunks_of((await plain.chat(tools=[WEATHER], stream=True)).text)

    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": None, "refusal": None}
    assert [choice["delta"] for choice in choices[1:-1]] == [{"tool_calls": [part]} for part in parts]
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(parts) + 1) + ["tool_calls"]


async def test_a_chunk_of_a_call_has_openais_bytes(plain: Edge) -> None:
    plain.router.deltas = [delta(begins(0, '{"é"'))]
    response = await plain.chat(tools=[WEATHER], stream=True)

    events = response.text.split("\n\n")
    head = events[1].partition('"choices":')[0]
    choice = head + '"choices":[{"index":0,"delta":'
    rest = ',"logprobs":null,"finish_reason":null}]}'
    assert events[1:3] == [
        choice
        + '{"tool_calls":[{"index":0,"id":"call_0","type":"function",'
        + '"function":{"name":"weather","arguments":""}}]}'
        + rest,
        choice + '{"tool_calls":[{"index":0,"function":{"arguments":"{\\"\\u00e9\\""}}]}' + rest,
    ]


REASONS: list[tuple[Any, list[pb.Delta], pb.FinishReason.ValueType, str]] = [
    ("auto", CALLS, pb.FINISH_REASON_STOP, "tool_calls"),
    ("auto", [delta(text="Hi")], pb.FINISH_REASON_STOP, "stop"),
    ("required", CALLS, pb.FINISH_REASON_STOP, "tool_calls"),
    (NAMED, CALLS[:3], pb.FINISH_REASON_STOP, "stop"),
    ("none", [delta(text="Hi")], pb.FINISH_REASON_STOP, "stop"),
    ("auto", CALLS[:2], pb.FINISH_REASON_LENGTH, "length"),
    ("required", CALLS[:2], pb.FINISH_REASON_LENGTH, "length"),
    (NAMED, CALLS[:2], pb.FINISH_REASON_LENGTH, "length"),
    ("auto", CALLS[:2], pb.FINISH_REASON_STOP_SEQUENCE, "stop"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("choice", "deltas", "reason", "expected"), REASONS)
async def test_the_finish_reason_of_calls_is_openais(
    plain: Edge,
    choice: Any,
    deltas: list[pb.Delta],
    reason: pb.FinishReason.ValueType,
    expected: str,
    stream: bool,
) -> None:
    plain.router.deltas, plain.router.reason = deltas, reason
    response = await plain.chat(tools=[WEATHER], tool_choice=choice, stream=stream)

    answer = chunks_of(response.text)[-1] if stream else response.json()
    assert answer["choices"][0]["finish_reason"] == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_may_have_text_before_its_calls(plain: Edge, stream: bool) -> None:
    plain.router.deltas = [delta(text="Let me "), delta(begins(0, "{}"), text="see.")]
    response = await plain.chat(tools=[WEATHER], stream=stream)

    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(response.text)]
        assert deltas[1:-1] == [
            {"content": "Let me "},
            {"content": "see."},
            {"tool_calls": [first_part(0)]},
            {"tool_calls": [next_part(0, "{}")]},
        ]
    else:
        message = response.json()["choices"][0]["message"]
        assert message["content"] == "Let me see."
        assert message["tool_calls"] == [{**whole_call(1), "id": "call_0"}]


async def test_each_choice_has_its_own_calls(plain: Edge) -> None:
    plain.router.deltas = CALLS
    chunks = chunks_of((await plain.chat(tools=[WEATHER], stream=True, n=2)).text)
    whole = (await plain.chat(tools=[WEATHER], n=2)).json()

    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        parts = [part for choice in mine for part in choice["delta"].get("tool_calls", [])]
        for place in (0, 1):
            own = [part["function"]["arguments"] for part in parts if part["index"] == place]
            assert "".join(own) == ARGUMENTS[place]
        assert mine[-1]["finish_reason"] == "tool_calls"
        assert whole["choices"][index]["message"]["tool_calls"] == [whole_call(0), whole_call(1)]


async def test_log_probabilities_and_ids_come_with_the_first_chunk_of_their_tokens(plain: Edge) -> None:
    token = pb.TokenLogprobs(token=pb.TokenLogprob(id=7, logprob=-0.5, text=b"{}"))
    marker = pb.Delta(token_count=1, token_ids=[1], tokens=[token])
    part = pb.Delta(token_count=1, token_ids=[2], tokens=[token], tool_calls=[begins(0, "{}")])
    plain.router.deltas = [marker, part]
    asked: dict[str, Any] = {"tools": [WEATHER], "logprobs": True, "return_token_ids": True}
    streamed = chunks_of((await plain.chat(**asked, stream=True)).text)
    whole = (await plain.chat(**asked)).json()["choices"][0]

    choices = [chunk["choices"][0] for chunk in streamed]
    assert [choice.get("token_ids") for choice in choices] == [None, [1], [2], None, None]
    assert [bool(choice["logprobs"]) for choice in choices] == [False, True, True, False, False]
    assert len(whole["logprobs"]["content"]) == 2
    assert whole["token_ids"] == [1, 2]


@pytest.mark.parametrize("tools", [[], [WEATHER]], ids=["alone", "with_tools"])
@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_comes_before_the_content_under_both_names(
    plain: Edge, stream: bool, tools: list[Any]
) -> None:
    plain.router.deltas = [
        delta(reasoning="Hm"),
        delta(reasoning="m.", text="Y"),
        delta(text="es"),
        delta(),
    ]
    response = await plain.chat(stream=stream, tools=tools)

    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(response.text)]
        assert deltas[1:] == [
            {"reasoning": "Hm", "reasoning_content": "Hm"},
            {"reasoning": "m.", "reasoning_content": "m."},
            {"content": "Y"},
            {"content": "es"},
            {},
        ]
    else:
        message = response.json()["choices"][0]["message"]
        assert message["reasoning"] == message["reasoning_content"] == "Hmm."
        assert message["content"] == "Yes"


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_left_out_by_request(plain: Edge, stream: bool) -> None:
    plain.router.deltas = [delta(reasoning="Hm"), delta(reasoning="m", text="Y"), delta(text="es")]
    response = await plain.chat(stream=stream, include_reasoning=False)

    assert "reasoning" not in response.text
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(response.text)]
        assert deltas[1:] == [{"content": "Y"}, {"content": "es"}, {}]


async def test_reasoning_without_an_answer_has_an_empty_content(plain: Edge) -> None:
    plain.router.deltas = [delta(reasoning="Hmm")]
    plain.router.reason = pb.FINISH_REASON_LENGTH
    message = (await plain.chat()).json()["choices"][0]["message"]

    assert (message["content"], message["reasoning"]) == ("", "Hmm")


async def test_arguments_of_a_megabyte_arrive_whole(plain: Edge) -> None:
    piece = '\\"é' * 20_000
    plain.router.deltas = [delta(begins(0, "{"))] + [delta(continues(0, piece)) for _ in range(12)]
    whole = (await plain.chat(tools=[WEATHER])).json()
    chunks = chunks_of((await plain.chat(tools=[WEATHER], stream=True)).text)

    expected = "{" + piece * 12
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == expected
    parts = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(part["function"]["arguments"] for part in parts) == expected
    assert json.dumps(parts[0]) == json.dumps(first_part(0))
