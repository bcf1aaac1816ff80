"""Tools, their choice and their calls in messages become those of the mesh, and what cannot is explained."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from headrace import errors
from headrace.gateway.api.bounded import bounded_json
from headrace.gateway.http.exchange import LARGE_BODY, Exchange
from headrace.gateway.problems import Problem
from headrace.v1 import generation_pb2 as pb
from tests.gateway.fake_router import Edge

SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"const": 1.0}}, "required": ["z"]}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def call(id: str, name: str, **fields: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, **fields}}


async def test_tools_keep_the_order_of_their_properties(plain: Edge) -> None:
    tools = [tool("b.2", description="Does b.", parameters=SCHEMA, strict=False), tool("a-1")]
    response = await plain.chat(tools=tools)

    assert response.status_code == 200, response.text
    assert "x-headrace-ignored" not in response.headers
    first, second = plain.asked.chat.tools
    assert (first.name, first.description) == ("b.2", "Does b.")
    assert first.parameters == json.dumps(SCHEMA, separators=(",", ":"))
    assert second == pb.Tool(name="a-1")
    assert not plain.asked.chat.HasField("tool_choice")
    assert not plain.asked.chat.HasField("parallel_tool_calls")


CHOICES: list[tuple[Any, pb.ToolChoice]] = [
    ("auto", pb.ToolChoice(mode=pb.TOOL_MODE_AUTO)),
    ("none", pb.ToolChoice(mode=pb.TOOL_MODE_NONE)),
    ("required", pb.ToolChoice(mode=pb.TOOL_MODE_REQUIRED)),
    ({"type": "function", "function": {"name": "b"}}, pb.ToolChoice(name="b")),
]


@pytest.mark.parametrize(("value", "choice"), CHOICES, ids=str)
async def test_the_choice_of_tools_is_passed_on(plain: Edge, value: Any, choice: pb.ToolChoice) -> None:
    response = await plain.chat(tools=[tool("a"), tool("b")], tool_choice=value)

    assert response.status_code == 200, response.text
    assert plain.asked.chat.tool_choice == choice


async def test_only_allowed_tools_are_passed_on(plain: Edge) -> None:
    allowed = {"mode": "required", "tools": [tool("c"), tool("a")]}
    response = await plain.chat(
        tools=[tool("a"), tool("b"), tool("c")],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    )

    assert response.status_code == 200, response.text
    assert [one.name for one in plain.asked.chat.tools] == ["a", "c"]
    assert plain.asked.chat.tool_choice.mode == pb.TOOL_MODE_REQUIRED


@pytest.mark.parametrize("value", ["auto", "none", None])
async def test_without_tools_a_choice_that_requires_none_has_no_effect(plain: Edge, value: Any) -> None:
    response = await plain.chat(tools=[], tool_choice=value, parallel_tool_calls=True)

    assert response.headers["x-headrace-ignored"] == "parallel_tool_calls"
    assert [field.name for field, _ in plain.asked.chat.ListFields()] == ["messages"]


async def test_calls_and_results_in_messages_are_passed_on(plain: Edge) -> None:
    turns = [
        {"role": "user", "content": "Weather?", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Both.",
            "tool_calls": [call("1", "weather", arguments='{"in": "Köln"}'), call("2", "now")],
        },
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "12 °C"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "noon"}]},
    ]
    response = await plain.chat(messages=turns)

    assert response.status_code == 200, response.text
    assert "x-headrace-ignored" not in response.headers
    calls = [
        pb.ToolCall(id="1", name="weather", arguments='{"in": "Köln"}'),
        pb.ToolCall(id="2", name="now"),
    ]
    assert list(plain.asked.chat.messages) == [
        pb.Message(role="user", content="Weather?", name="ann"),
        pb.Message(role="assistant", reasoning="Both.", tool_calls=calls),
        pb.Message(role="tool", content="12 °C", tool_call_id="1", name="weather"),
        pb.Message(role="tool", content="noon", tool_call_id="2"),
    ]


async def test_reasoning_has_two_names(plain: Edge) -> None:
    said = {"role": "assistant", "content": "a", "reasoning": "new", "reasoning_content": "old"}
    ask = {"role": "user", "content": "b"}
    await plain.chat(messages=[ask, said, ask])

    assert plain.asked.chat.messages[1].reasoning == "new"


async def test_unknown_fields_of_tools_are_named_once(plain: Edge) -> None:
    tools = [{**tool(f"t{number}", cache=1, other=None), "defer_loading": True} for number in range(9)]
    response = await plain.chat(tools=tools)

    assert response.headers["x-headrace-ignored"] == "tools[].defer_loading, tools[].function.cache"


CHOICE = "tool_choice"
ALLOWED = "tool_choice.allowed_tools"


def allowed(**fields: Any) -> dict[str, Any]:
    return {"tools": [tool("a")], CHOICE: {"type": "allowed_tools", "allowed_tools": fields}}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "tools", "is an object, must be a list"),
    ({"tools": [5]}, "tools[0]", "is 5, must be an object"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type", "is 'custom', which is not"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing: set its name and parameters"),
    ({"tools": [{"function": {}}]}, "tools[0].function.name", "is missing: set it"),
    ({"tools": [tool(5)]}, "tools[0].function.name", "is 5, must be a string"),  # type: ignore[arg-type]
    ({"tools": [tool("a", parameters=[])]}, "tools[0].function.parameters", "is a list, must be an object"),
    ({"tools": [tool("a", strict="yes")]}, "tools[0].function.strict", "is 'yes', must be true or false"),
    ({"tools": [tool("a")] * 129}, "tools", "has more than 128 elements: remove some"),
    (
        {"tools": [tool("a"), tool("b", parameters={"enum": ["x" * 2**16]})]},
        "tools[1].function.parameters",
        "has more than 65536 bytes as JSON: shorten it",
    ),
    ({CHOICE: "required"}, CHOICE, "is set without tools: set tools"),
    ({CHOICE: tool("a")}, CHOICE, "is set without tools: set tools"),
    ({"tools": [tool("a")], CHOICE: "any"}, CHOICE, 'is \'any\', must be "auto", "none",'),
    ({"tools": [tool("a")], CHOICE: 5}, CHOICE, "is of another form, must be"),
    ({"tools": [tool("a")], CHOICE: {"type": "function"}}, CHOICE, "is of another form, must be"),
    ({"tools": [tool("a")], CHOICE: {"type": "custom"}}, CHOICE, "is of another form, must be"),
    ({"tools": [tool("a")], CHOICE: tool("b")}, "tool_choice.function.name", "is 'b', which no tool has"),
    (allowed(mode="none", tools=[tool("a")]), f"{ALLOWED}.mode", 'must be "auto" or "required"'),
    (allowed(mode="auto", tools=[]), f"{ALLOWED}.tools", "must be a list of 1 to 128 tools"),
    (allowed(mode="auto", tools=[tool("a"), {}]), f"{ALLOWED}.tools[1]", 'must be {"type": "function",'),
    (allowed(mode="auto", tools=[tool("b")]), f"{ALLOWED}.tools", "has 'b', which no tool has as its name"),
    ({"tools": [tool("a")], "parallel_tool_calls": 1}, "parallel_tool_calls", "is 1, must be true or false"),
]


@pytest.mark.parametrize(("fields", "param", "complaint"), WRONG, ids=str)
async def test_wrong_tools_are_explained(
    plain: Edge, fields: dict[str, Any], param: str, complaint: str
) -> None:
    response = await plain.chat(**fields)

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param} {complaint}")
    assert not plain.router.requests


WRONG_TURNS: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_calls": 5}, "tool_calls", "is 5, must be a list"),
    ({"tool_calls": [{"function": {"name": "f"}}]}, "tool_calls[0].id", "is missing: set it"),
    ({"tool_calls": [{"id": "1"}]}, "tool_calls[0].function", "is missing: set its name and arguments"),
    ({"tool_calls": [{"id": "1", "type": "custom"}]}, "tool_calls[0].type", "is 'custom', which is not"),
    (
        {"tool_calls": [call("1", "f", arguments={})]},
        "tool_calls[0].function.arguments",
        "is an object, must",
    ),
    ({"tool_calls": [call("1", "f")] * 129}, "tool_calls", "has more than 128 elements: remove some"),
    ({"name": 5}, "name", "is 5, must be a string"),
    ({"tool_call_id": 5}, "tool_call_id", "is 5, must be a string"),
    ({"reasoning": 5}, "reasoning", "is 5, must be a string"),
]


@pytest.mark.parametrize(("fields", "param", "complaint"), WRONG_TURNS, ids=str)
async def test_wrong_calls_in_messages_are_explained(
    plain: Edge, fields: dict[str, Any], param: str, complaint: str
) -> None:
    response = await plain.chat(messages=[{"role": "assistant", "content": "a", **fields}])

    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == f"messages[0].{param}"
    assert error["message"].startswith(f"messages[0].{param} {complaint}")


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("chat.tools", "tools"),
        ("chat.tools[1].name", "tools[1].function.name"),
        ("chat.tools[1].parameters", "tools[1].function.parameters"),
        ("chat.tool_choice", "tool_choice"),
        ("chat.tool_choice.mode", "tool_choice"),
        ("chat.tool_choice.name", "tool_choice.function.name"),
        ("chat.parallel_tool_calls", "parallel_tool_calls"),
        ("chat.messages[2].tool_calls[10].arguments", "messages[2].tool_calls[10].function.arguments"),
        ("chat.messages[2].tool_calls[10].name", "messages[2].tool_calls[10].function.name"),
        ("chat.messages[2].tool_calls[10].id", "messages[2].tool_calls[10].id"),
        ("chat.messages[2].tool_call_id", "messages[2].tool_call_id"),
        ("chat.messages[2].reasoning", "messages[2].reasoning"),
    ],
)
async def test_errors_of_the_mesh_about_tools_name_the_callers_parameter(
    plain: Edge, field: str, param: str
) -> None:
    plain.router.refuses = errors.InvalidRequest(f"{field} is wrong: change it", field=field)
    response = await plain.chat(tools=[tool("a"), tool("b")])

    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["message"]) == (param, f"{param} is wrong: change it")


async def test_errors_of_the_mesh_about_allowed_tools_have_their_place_among_all(plain: Edge) -> None:
    plain.router.refuses = errors.InvalidRequest("bad", field="chat.tools[1].parameters")
    allowed = {"mode": "auto", "tools": [tool("b"), tool("d")]}
    response = await plain.chat(
        tools=[tool(name) for name in "abcd"],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    )

    assert response.json()["error"]["param"] == "tools[3].function.parameters"


@pytest.mark.parametrize("size", [10, LARGE_BODY])
async def test_a_large_body_is_translated_on_another_thread(size: int) -> None:
    async def send(message: Any) -> None:
        raise AssertionError

    body = json.dumps({"a": "x" * size}).encode()
    exchange = Exchange({"headers": [], "http_version": "1.1"}, send, body=body)
    large, thread = await exchange.read(lambda body, large: (large, threading.get_ident()))

    assert large is (size == LARGE_BODY)
    assert large is (thread != threading.get_ident())


@pytest.mark.parametrize("large", [False, True])
def test_json_may_have_as_many_bytes_as_the_limit(large: bool) -> None:
    value = {"é": {"a": [1, None, "b"]}}
    text = '{"é":{"a":[1,null,"b"]}}'
    size = len(text.encode())

    assert bounded_json(value, "x", size, large=large) == text
    with pytest.raises(Problem, match=f"x has more than {size - 1} bytes as JSON"):
        bounded_json(value, "x", size - 1, large=large)


@pytest.mark.parametrize("large", [False, True])
def test_json_of_any_size_is_refused_alike(large: bool) -> None:
    nested: Any = 1
    for _ in range(300):  # more than a body may have
        nested = [nested]
    for value in (["x" * 200], [1] * 200, {"x" * 200: 1}, {str(number): 1 for number in range(99)}, nested):
        with pytest.raises(Problem) as raised:
            bounded_json(value, "tools[0]", 100, large=large)
        assert raised.value.param == "tools[0]"


async def test_the_form_of_calls_is_that_of_the_tools(plain: Edge) -> None:
    text = "sampling.structured cannot be combined with sampling.ignore_eos"
    plain.router.refuses = errors.InvalidSampling(text, field="sampling.structured")
    error = (await plain.chat(tools=[tool("a")])).json()["error"]
    with_form = (await plain.chat(tools=[tool("a")], guided_regex="a")).json()["error"]

    assert (error["param"], error["message"]) == ("tools", "tools cannot be combined with ignore_eos")
    assert with_form["param"] == "guided_regex"
