"""Schemas, tools and a loop of call, result and answer with the large default model through all processes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import jsonschema
import pydantic
import pytest

from headrace.cli.launch.mesh import Running
from headrace.client import Client, chat, connect, tool, tool_result
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect

pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 30}},
    "required": ["city"],
    "additionalProperties": False,
}
MINUTES = {
    "type": "object",
    "properties": {"minutes": {"type": "integer", "minimum": 1, "maximum": 600}},
    "required": ["minutes"],
    "additionalProperties": False,
}
TOOLS = [tool("get_weather", "Returns the weather in a city.", CITY), tool("set_timer", "Sets it.", MINUTES)]
SCHEMAS = {"get_weather": CITY, "set_timer": MINUTES}


def asking(text: Any, **sampling: Any) -> pb.GenerateRequest:
    request = chat(text, tools=TOOLS, max_tokens=64, **{"temperature": 0.0, **sampling})
    request.routing.tier = "large"
    request.stream.include_token_ids = True
    return request


@pytest.fixture(scope="module")
async def client(real_mesh: Running) -> AsyncGenerator[Client, None]:
    async with connect(real_mesh.address) as client:
        yield client


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_required_calls_are_valid_at_any_temperature(client: Client, temperature: float) -> None:
    request = asking("What is the weather in Paris?", temperature=temperature, seed=3)
    request.chat.tool_choice.mode = pb.TOOL_MODE_REQUIRED
    request.chat.parallel_tool_calls = False

    answer = await collect(client, request, timeout=1200)

    (call,) = answer.calls
    assert answer.text == ""
    assert answer.finish.reason == pb.FINISH_REASON_STOP
    jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    if temperature == 0:
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})


async def test_a_named_tool_is_called_whatever_the_question(client: Client) -> None:
    request = asking("Tell me a joke.")
    request.chat.tool_choice.name = "set_timer"

    (call,) = (await collect(client, request, timeout=1200)).calls

    assert call.name == "set_timer"
    jsonschema.validate(json.loads(call.arguments), MINUTES)


async def test_a_model_that_decides_writes_text_or_valid_calls(client: Client) -> None:
    for text in ("What is the weather in Paris?", "Thank you!", "Set a timer for 5 minutes."):
        answer = await collect(client, asking(text), timeout=1200)

        assert answer.calls or answer.text.strip()
        assert "<tool_call>" not in answer.text
        for call in answer.calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


async def test_a_call_its_result_and_the_answer(client: Client) -> None:
    """The answer depends on the result, so the result has reached the model. A form keeps it short."""
    question = "What is the weather in Paris?"
    first = asking(question)
    first.chat.tool_choice.mode = pb.TOOL_MODE_REQUIRED
    first.chat.parallel_tool_calls = False
    reply = await client.ask(first, timeout=1200)

    for result in ("rain", "snow", "sunshine"):
        told = [tool_result(call, json.dumps({"weather": result})) for call in reply.calls]
        second = asking([("user", question), reply.message, *told])
        second.chat.tool_choice.mode = pb.TOOL_MODE_NONE
        second.sampling.regex = "In Paris there is (rain|snow|sunshine|fog)[.]"
        answer = await client.ask(second, timeout=1200)

        assert (answer.text, answer.calls) == (f"In Paris there is {result}.", ())


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=40)
    age: int


async def test_an_answer_is_an_instance_of_a_model(client: Client) -> None:
    request = chat("Answer as JSON with name and age: Maria is 34 years old.", temperature=0, max_tokens=48)
    request.routing.tier = "large"

    assert await client.parse(request, Person, timeout=1200) == Person(name="Maria", age=34)
