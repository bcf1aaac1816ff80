"""OpenAI's package calls tools and reads structured output, over HTTP, unchanged."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ParsedFunctionToolCall
from pydantic import BaseModel

from headrace.v1 import generation_pb2 as pb
from tests.gateway.fake_router import Edge

USER: ChatCompletionMessageParam = {"role": "user", "content": "Weather in Köln?"}


class Place(BaseModel):
    """Where it is, in words."""

    town: str
    days: int = 1


WEATHER = openai.pydantic_function_tool(Place, name="weather", description="Returns the weather.")
ARGUMENTS = '{"town": "Köln", "days": 2}'
CALL = [
    pb.Delta(token_count=1, tool_calls=[pb.ToolCallDelta(index=0, id="call_1", name="weather")]),
    pb.Delta(token_count=3, tool_calls=[pb.ToolCallDelta(index=0, arguments=ARGUMENTS[:9])]),
    pb.Delta(
        token_count=5,
        tool_calls=[
            pb.ToolCallDelta(index=0, arguments=ARGUMENTS[9:]),
            pb.ToolCallDelta(index=1, id="call_2", name="weather", arguments='{"town": "Bonn", "days": 1}'),
        ],
    ),
]


@pytest.fixture
async def client(plain: Edge) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(base_url=plain.url, api_key="none", max_retries=0) as made:
        yield made


async def test_the_loop_of_call_result_and_answer(plain: Edge, client: openai.AsyncOpenAI) -> None:
    plain.router.deltas = CALL
    messages: list[ChatCompletionMessageParam] = [USER]
    first = await client.chat.completions.create(
        model="auto", messages=messages, tools=[WEATHER], tool_choice="auto", parallel_tool_calls=True
    )
    calls = first.choices[0].message.tool_calls or []
    messages.append(first.choices[0].message.to_dict())  # type: ignore[arg-type]
    for call in calls:
        assert call.type == "function"
        days = json.loads(call.function.arguments)["days"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"{days} sunny days"})
    plain.router.deltas = [pb.Delta(token_count=1, text="Sunny.")]
    second = await client.chat.completions.create(model="auto", messages=messages, tools=[WEATHER])

    assert first.choices[0].finish_reason == "tool_calls"
    assert second.choices[0].message.content == "Sunny."
    assert second.choices[0].message.tool_calls is None
    asked = plain.router.requests[1].chat
    assert [turn.role for turn in asked.messages] == ["user", "assistant", "tool", "tool"]
    assert list(asked.messages[1].tool_calls) == [
        pb.ToolCall(id="call_1", name="weather", arguments=ARGUMENTS),
        pb.ToolCall(id="call_2", name="weather", arguments='{"town": "Bonn", "days": 1}'),
    ]
    assert [(turn.tool_call_id, turn.content) for turn in asked.messages[2:]] == [
        ("call_1", "2 sunny days"),
        ("call_2", "1 sunny days"),
    ]
    assert plain.router.requests[0].chat.parallel_tool_calls
    schema = json.loads(plain.router.requests[0].chat.tools[0].parameters)
    assert list(schema["properties"]) == ["town", "days"]


@pytest.mark.parametrize(
    ("choice", "sent", "reason"),
    [
        ("required", pb.ToolChoice(mode=pb.TOOL_MODE_REQUIRED), "tool_calls"),
        ({"type": "function", "function": {"name": "weather"}}, pb.ToolChoice(name="weather"), "stop"),
    ],
    ids=["required", "named"],
)
async def test_calls_can_be_required(
    plain: Edge, client: openai.AsyncOpenAI, choice: Any, sent: pb.ToolChoice, reason: str
) -> None:
    plain.router.deltas = CALL[:2]
    answer = await client.chat.completions.create(
        model="auto", messages=[USER], tools=[WEATHER], tool_choice=choice, n=2
    )

    assert plain.asked.chat.tool_choice == sent
    assert [one.finish_reason for one in answer.choices] == [reason, reason]
    assert [len(one.message.tool_calls or []) for one in answer.choices] == [1, 1]


@pytest.mark.parametrize("logprobs", [False, True])
async def test_the_helper_for_streams_reports_calls(
    plain: Edge, client: openai.AsyncOpenAI, logprobs: bool
) -> None:
    plain.router.deltas = CALL
    async with client.chat.completions.stream(
        model="auto", messages=[USER], tools=[WEATHER], logprobs=logprobs
    ) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()

    parts = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert "".join(part.arguments_delta for part in parts if part.index == 0) == ARGUMENTS
    assert [(one.index, one.name, one.parsed_arguments) for one in done] == [
        (0, "weather", Place(town="Köln", days=2)),
        (1, "weather", Place(town="Bonn", days=1)),
    ]
    message = final.choices[0].message
    assert message.content is None
    assert [call.id for call in message.tool_calls or []] == ["call_1", "call_2"]
    assert final.choices[0].finish_reason == "tool_calls"


async def test_calls_are_parsed_by_the_class_of_their_arguments(
    plain: Edge, client: openai.AsyncOpenAI
) -> None:
    plain.router.deltas = CALL
    answer = await client.chat.completions.parse(model="auto", messages=[USER], tools=[WEATHER])

    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert all(isinstance(call, ParsedFunctionToolCall) for call in calls)
    assert calls[0].function.parsed_arguments == Place(town="Köln", days=2)


async def test_an_answer_is_parsed_by_its_class(plain: Edge, client: openai.AsyncOpenAI) -> None:
    plain.router.tokens = [b'{"town": "K\xc3', b'\xb6ln", ', b'"days": 3}']
    answer = await client.chat.completions.parse(model="auto", messages=[USER], response_format=Place, n=2)

    assert [choice.message.parsed for choice in answer.choices] == [Place(town="Köln", days=3)] * 2
    schema = json.loads(plain.asked.sampling.json_schema)
    assert list(schema["properties"]) == ["town", "days"]
    assert schema["additionalProperties"] is False


async def test_the_helper_for_streams_parses_an_answer_as_it_comes(
    plain: Edge, client: openai.AsyncOpenAI
) -> None:
    plain.router.tokens = [b'{"town": "Bonn', b'", "days"', b": 3}"]
    async with client.chat.completions.stream(model="auto", messages=[USER], response_format=Place) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()

    assert final.choices[0].message.parsed == Place(town="Bonn", days=3)
    deltas = [event.delta for event in events if event.type == "content.delta" and event.delta]
    assert deltas == [token.decode() for token in plain.router.tokens]
    assert [event.parsed for event in events if event.type == "content.done"] == [Place(town="Bonn", days=3)]


async def test_reasoning_is_read_from_a_message_and_a_delta(plain: Edge, client: openai.AsyncOpenAI) -> None:
    plain.router.deltas = [
        pb.Delta(token_count=1, reasoning="Hm"),
        pb.Delta(token_count=2, reasoning="m", text="Yes"),
    ]
    whole = await client.chat.completions.create(model="auto", messages=[USER])
    stream = await client.chat.completions.create(model="auto", messages=[USER], stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]

    message = whole.choices[0].message
    assert (message.content, message.model_extra) == ("Yes", {"reasoning": "Hmm", "reasoning_content": "Hmm"})
    assert "".join((delta.model_extra or {}).get("reasoning", "") for delta in deltas) == "Hmm"
    assert "".join(delta.content or "" for delta in deltas) == "Yes"


async def test_vllms_parameters_are_extra_ones(plain: Edge, client: openai.AsyncOpenAI) -> None:
    choices = {"structured_outputs": {"choice": ["yes", "no"]}}
    await client.chat.completions.create(model="auto", messages=[USER], extra_body=choices)
    await client.completions.create(model="auto", prompt="Sure?", extra_body=choices)

    assert [list(asked.sampling.choices.texts) for asked in plain.router.requests] == [["yes", "no"]] * 2


async def test_errors_name_the_field_at_fault(plain: Edge, client: openai.AsyncOpenAI) -> None:
    functions: Any = [{"name": "f"}]
    with pytest.raises(openai.BadRequestError) as deprecated:
        await client.chat.completions.create(model="auto", messages=[USER], functions=functions)
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.chat.completions.create(
            model="auto",
            messages=[USER],
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "now"}},
        )

    assert deprecated.value.param == "functions"
    assert "use tools" in deprecated.value.message
    assert unknown.value.param == "tool_choice.function.name"
