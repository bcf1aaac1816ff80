"""Whatever a caller sends, the response is an answer or an error in OpenAI's shape: never 500, no hang."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.gateway.api.chat.parameters import ChatParameters
from tests.gateway.fake_router import Edge, edge
from tests.harness import PATIENCE

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(
    sorted({*ChatParameters.model_fields, *ChatParameters.ignored, *ChatParameters.refused})
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "refusal", "image_url"]) | anything},
    optional={"text": st.text(max_size=5) | anything, "refusal": anything, "x": anything},
)
functions = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b"]) | anything},
    optional={
        "description": st.text(max_size=5) | anything,
        "parameters": st.dictionaries(st.text(max_size=8), anything, max_size=3) | anything,
        "strict": anything,
    },
)
tools = st.fixed_dictionaries({"type": st.just("function") | anything, "function": functions | anything})
calls = st.fixed_dictionaries(
    {"id": st.text(max_size=5) | anything},
    optional={
        "type": st.just("function") | anything,
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["a", "b"]) | anything, "arguments": st.just("{}") | anything}
        ),
    },
)
choices = st.sampled_from(["auto", "none", "required"]) | tools
allowed = st.fixed_dictionaries(
    {
        "type": st.just("allowed_tools"),
        "allowed_tools": st.fixed_dictionaries(
            {"mode": choices | anything, "tools": st.lists(tools, max_size=2) | anything}
        )
        | anything,
    }
)
schemas = st.fixed_dictionaries({}, optional={"name": anything, "schema": anything, "strict": anything})
formats = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema"]) | anything},
    optional={"json_schema": schemas | anything},
)
outputs = st.dictionaries(
    st.sampled_from(["json", "json_object", "regex", "choice", "grammar", "structural_tag"]),
    anything | st.lists(st.text(max_size=3), max_size=3),
    max_size=2,
)
forms = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.lists(tools, max_size=2) | anything,
        "tool_choice": choices | allowed | anything,
        "response_format": formats | anything,
        "structured_outputs": outputs | anything,
        "parallel_tool_calls": anything,
    },
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | anything},
        optional={
            "content": st.text(max_size=5) | st.lists(parts, max_size=3) | anything,
            "name": st.text(max_size=5) | anything,
            "tool_call_id": st.text(max_size=5) | anything,
            "tool_calls": st.lists(calls, max_size=2) | anything,
            "reasoning": st.text(max_size=5) | anything,
            "reasoning_content": anything,
        },
    ),
    max_size=3,
)
small = st.integers(min_value=-2, max_value=3) | st.floats(min_value=0, max_value=1)
bodies = st.builds(
    lambda turns, forms, others: {"messages": turns, **forms, **others},
    st.just([{"role": "user", "content": "Hi"}]) | messages | anything,
    st.just({}) | forms,
    st.dictionaries(names, small | st.booleans() | anything, max_size=4)
    | st.dictionaries(st.text(max_size=8), anything, max_size=2),
)


async def respond(running: Edge, body: bytes) -> None:
    running.router.reset()
    response = await asyncio.wait_for(
        running.http.post("/chat/completions", content=body, headers={"content-type": "application/json"}),
        PATIENCE,
    )

    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code == 200:
        assert running.router.requests
        return
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 1000


async def test_any_json_gives_an_answer_or_an_error_in_shape() -> None:
    async with edge() as running:
        loop = asyncio.get_running_loop()

        @settings(max_examples=120)
        @example(body={"messages": [{"role": "user", "content": "a"}], "stop": ["x"] * 99})
        @example(body={"messages": [{"role": "user", "content": "\x00"}], "user": "\x7f"})
        @example(body=[])
        @example(body={})
        @given(body=bodies | anything)
        def check(body: Any) -> None:
            done = asyncio.run_coroutine_threadsafe(respond(running, json.dumps(body).encode()), loop)
            done.result(PATIENCE)

        await asyncio.to_thread(check)

    assert running.router.active == 0


async def test_any_bytes_give_an_error_in_shape(plain: Edge) -> None:
    for body in (
        b"",
        b"\xff",
        b'{"messages": "\\ud800"}',
        b"[" * 10_000,
        b"NaN",
        b'{"a"',
    ):
        response = await plain.http.post(
            "/chat/completions", content=body, headers={"content-type": "application/json"}
        )

        assert response.status_code == 400
        assert response.json()["error"]["code"] in ("invalid_json", "missing_required_parameter")


FUNCTION = {"name": "f", "parameters": {"type": "object"}}


def nested(levels: int) -> dict[str, Any]:
    """Return a schema within schemas."""
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


HUGE: list[dict[str, Any]] = [
    {"tools": [{"type": "function", "function": FUNCTION}] * 10_000},
    {"tools": [{"type": "function", "function": {**FUNCTION, "name": "f" * 10**6}}]},
    {"tools": [{"type": "function", "function": FUNCTION, **{f"k{n}": 1 for n in range(10_000)}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": ["x" * 10**6]}}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": [1] * 200_000}}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(90)}}]},
    {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": nested(90)},
    {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "x" * 10**6},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": nested(90)}}},
    {"response_format": {"type": "x" * 10**6}},
    {"structured_outputs": {"json": "[" * 10**6}},
    {"structured_outputs": {"regex": "(" * 10**6}},
    {"structured_outputs": {"choice": ["x" * 1000] * 1024}},
    {"structured_outputs": {"grammar": "start: " + "(" * 10**6}},
    {"guided_choice": ["x"] * 100_000},
    {
        "messages": [
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[" * 10**6}}],
            }
        ]
    },
    {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}] * 10_000}]},
    {"messages": [{"role": "user", "content": "a", "reasoning": "x" * 10**6}]},
]


@pytest.mark.parametrize("parameters", HUGE, ids=lambda value: f"{value}"[:70])
async def test_huge_values_give_an_answer_or_an_error_in_shape(
    plain: Edge, parameters: dict[str, Any]
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **parameters}

    await respond(plain, json.dumps(body).encode())
