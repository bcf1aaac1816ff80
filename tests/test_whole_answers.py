"""The client gathers whole answers, and returns those with a JSON schema as instances of a class."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pydantic
import pytest

from headrace import errors
from headrace.client import chat, gather, tool, tool_result
from headrace.v1 import generation_pb2 as pb
from tests.router.answering.test_forms import CALL, FormBatcher
from tests.router.fake_batchers import routed


class City(pydantic.BaseModel):
    name: str
    people: int

    @pydantic.field_validator("name")
    @classmethod
    def known(cls, name: str) -> str:
        if name == "Atlantis":
            raise ValueError("no such city")
        return name


PARIS = '{"name": "Paris", "people": 2100000}'


def answering(text: str, reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP) -> FormBatcher:
    return FormBatcher(deltas=[pb.Delta(text=letter) for letter in text], reason=reason)


async def test_an_answer_is_returned_as_an_instance_of_the_model() -> None:
    fake = answering(PARIS)
    request = chat("Which city?", max_tokens=40)
    async with routed(only=fake) as client:
        city = await client.parse(request, City, timeout=60)

    assert city == City(name="Paris", people=2_100_000)
    closed = {**City.model_json_schema(), "additionalProperties": False}
    assert json.loads(fake.requests[0].sampling.json_schema) == closed
    assert not request.sampling.HasField("json_schema"), "the caller's request is unchanged"


class Street(pydantic.BaseModel):
    type: str
    properties: list[City]
    counts: dict[str, int]


class Open(pydantic.BaseModel, extra="allow"):
    street: Street


async def test_objects_have_other_properties_where_the_model_allows_them_only() -> None:
    fake = answering('{"street": {"type": "t", "properties": [], "counts": {}}}')
    async with routed(only=fake) as client:
        await client.parse(chat("Which street?"), Open, timeout=60)

    schema = json.loads(fake.requests[0].sampling.json_schema)
    street = schema["$defs"]["Street"]
    assert schema["additionalProperties"] is True
    assert schema["$defs"]["City"]["additionalProperties"] is False
    assert street["additionalProperties"] is False
    assert street["properties"] == Street.model_json_schema()["properties"]


async def test_an_answer_that_was_cut_off_is_an_error_that_says_what_to_do() -> None:
    async with routed(only=answering(PARIS[:20], pb.FINISH_REASON_LENGTH)) as client:
        with pytest.raises(
            errors.AnswerCutOff, match=r"after 20 tokens.*increase sampling.max_tokens"
        ) as raised:
            await client.parse(chat("Which city?"), City, timeout=60)

    assert raised.value.field == "sampling.max_tokens"


async def test_an_answer_that_is_complete_at_its_limit_is_returned() -> None:
    async with routed(only=answering(PARIS, pb.FINISH_REASON_LENGTH)) as client:
        assert (await client.parse(chat("Which city?"), City, timeout=60)).name == "Paris"


async def test_conditions_beyond_the_schema_are_the_models_own() -> None:
    async with routed(only=answering(PARIS.replace("Paris", "Atlantis"))) as client:
        with pytest.raises(pydantic.ValidationError, match="no such city"):
            await client.parse(chat("Which city?"), City, timeout=60)


async def test_a_request_with_tools_calls_none_when_its_answer_is_parsed() -> None:
    fake = answering(PARIS)
    async with routed(only=fake) as client:
        await client.parse(chat("Which city?", tools=[tool("f", "Does it.")]), City, timeout=60)

    assert fake.requests[0].chat.tool_choice.mode == pb.TOOL_MODE_NONE


async def test_a_whole_answer_has_its_calls_and_continues_the_conversation() -> None:
    fake = FormBatcher(deltas=CALL)
    weather = tool("weather", "Returns the weather.", {"type": "object"})
    async with routed(only=fake) as client:
        reply = await client.ask(chat("Weather?", tools=[weather]), timeout=60)
        cities = [json.loads(call.arguments)["city"] for call in reply.calls]
        results = [tool_result(*pair) for pair in zip(reply.calls, cities, strict=True)]
        turns: list[Any] = [("user", "Weather?"), reply.message, *results]
        await client.ask(chat(turns, tools=[weather]), timeout=60)

    first, second = fake.requests
    assert reply.text == "Let me look. "
    assert reply.reasoning == "They ask for a city."
    assert reply.calls == (
        pb.ToolCall(id="call-0", name="weather", arguments='{"city": "Paris"}'),
        pb.ToolCall(id="call-1", name="weather", arguments='{"city": "Rome"}'),
    )
    assert reply.finish.reason == pb.FINISH_REASON_STOP
    assert json.loads(first.chat.tools[0].parameters) == {"type": "object"}
    user, said, *told = second.chat.messages
    assert (user.role, said.role) == ("user", "assistant")
    assert list(said.tool_calls) == list(reply.calls)
    assert [(each.role, each.content, each.tool_call_id, each.name) for each in told] == [
        ("tool", "Paris", "call-0", "weather"),
        ("tool", "Rome", "call-1", "weather"),
    ]


async def test_calls_of_any_number_of_parts_are_gathered_in_time() -> None:
    """A megabyte of arguments, a byte per part."""

    async def parts() -> AsyncIterator[pb.GenerateResponse]:
        first = pb.ToolCallDelta(id="a", name="f", arguments="[")
        yield pb.GenerateResponse(delta=pb.Delta(tool_calls=[first]))
        for _ in range(1_000_000):
            yield pb.GenerateResponse(delta=pb.Delta(tool_calls=[pb.ToolCallDelta(arguments="1")]))

    async with asyncio.timeout(60):
        reply = await gather(parts())

    assert len(reply.calls[0].arguments) == 1_000_001
