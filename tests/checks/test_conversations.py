"""Tools, calls and results are checked by their fields, with little work on the event loop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.checks.conversations import (
    MAX_DEPTH,
    READ_AT_ONCE,
    arguments_of_call,
    parameters_of_tool,
)
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenizer_service_pb2 as tokenizer_pb
from headrace.validation import check_request, check_tokenize

OBJECT = '{"type": "object", "properties": {"a": {}}}'


def asked(*tools: pb.Tool, **fields: Any) -> pb.Chat:
    return pb.Chat(messages=[pb.Message(role="user", content="hi")], tools=tools, **fields)


def called(*calls: pb.ToolCall, result: pb.Message | None = None) -> pb.Chat:
    chat = asked()
    chat.messages.add(role="assistant", tool_calls=calls)
    chat.messages.append(result or pb.Message(role="tool", content="x"))
    return chat


def last(**message: Any) -> pb.Chat:
    chat = called(pb.ToolCall(id="c", name="f"), result=pb.Message(**message))
    if message["role"] == "assistant":
        chat.messages.add(role="user", content="go")
    return chat


def nested(depth: int, text: str = "1") -> str:
    """Return an object of *depth* lists and objects in each other."""
    return '{"a": ' + "[" * (depth - 1) + text + "]" * (depth - 1) + "}"


def tool(parameters: str = "", name: str = "f") -> pb.Tool:
    return pb.Tool(name=name, parameters=parameters)


def call(arguments: str = "", name: str = "f", **fields: str) -> pb.ToolCall:
    return pb.ToolCall(name=name, arguments=arguments, **fields)


def choice(**fields: Any) -> dict[str, Any]:
    return {"tool_choice": pb.ToolChoice(**fields)}


TOO_LARGE = '{"a": "' + "x" * 65536 + '"}'
REJECTED: list[tuple[pb.Chat, str, str]] = [
    (asked(tool(name="")), "chat.tools[0].name", "1 to 64 letters"),
    (asked(tool(), tool(name="n" * 65)), "chat.tools[1].name", "65 characters"),
    (asked(tool(name="größe")), "chat.tools[0].name", "letters"),
    (asked(tool(name="f\n")), "chat.tools[0].name", "letters"),
    (asked(tool(), tool(name="g"), tool()), "chat.tools[2].name", "a name of its own"),
    (asked(*(tool(name=f"f{number}") for number in range(129))), "chat.tools", "at most 128"),
    (asked(tool(), tool(TOO_LARGE, "g")), "chat.tools[1].parameters", "at most 65536"),
    (asked(tool('{"a": "' + "é" * 33000 + '"}')), "chat.tools[0].parameters", "66009 bytes"),
    (asked(*(tool(nested(2, '"' + "x" * 65000 + '"'), f"f{n}") for n in range(17))), "chat.tools", "1048576"),
    (asked(tool(), tool("{", "g")), "chat.tools[1].parameters", "not JSON: .* character 1"),
    (asked(tool("[]")), "chat.tools[0].parameters", "not an object"),
    (asked(tool('{"a": NaN}')), "chat.tools[0].parameters", "NaN"),
    (asked(tool('{"a": ' + "1" * 5000 + "}")), "chat.tools[0].parameters", "not JSON"),
    (asked(tool('{"type": "string"}')), "chat.tools[0].parameters", 'must be "object"'),
    (asked(tool('{"type": ["object"]}')), "chat.tools[0].parameters", 'must be "object"'),
    (asked(tool(nested(MAX_DEPTH + 1))), "chat.tools[0].parameters", "in each other"),
    (asked(tool(nested(10_000))), "chat.tools[0].parameters", "in each other"),
    (asked(**choice()), "chat.tool_choice", "set mode or name"),
    (asked(**choice(mode=pb.TOOL_MODE_REQUIRED)), "chat.tool_choice", "chat.tools is empty"),
    (asked(**choice(mode=pb.TOOL_MODE_AUTO)), "chat.tool_choice", "chat.tools is empty"),
    (asked(**choice(name="f")), "chat.tool_choice", "chat.tools is empty"),
    (asked(tool(), **choice(mode=17)), "chat.tool_choice", "17"),
    (asked(tool(), **choice(name="g")), "chat.tool_choice", "'g', which is the name of no tool"),
    (last(role="user", content="x", tool_calls=[call()]), "chat.messages[2].tool_calls", "'assistant'"),
    (last(role="user", content="x", reasoning="y"), "chat.messages[2].reasoning", "'assistant'"),
    (last(role="user", content="x", tool_call_id="c"), "chat.messages[2].tool_call_id", "'tool'"),
    (last(role="assistant", tool_call_id="c"), "chat.messages[2].tool_call_id", "'tool'"),
    (last(role="tool", tool_call_id="d"), "chat.messages[2].tool_call_id", "no earlier call"),
    (last(role="tool", name="n" * 65), "chat.messages[2].name", "at most 64"),
    (called(call(), call(name="a b")), "chat.messages[1].tool_calls[1].name", "letters"),
    (called(call(id="i" * 129)), "chat.messages[1].tool_calls[0].id", "at most 128"),
    (called(call("[1]")), "chat.messages[1].tool_calls[0].arguments", "not an object"),
    (called(call(TOO_LARGE)), "chat.messages[1].tool_calls[0].arguments", "at most 65536"),
    (called(*[call()] * 129), "chat.messages[1].tool_calls", "at most 128"),
]


def complaint(chat: pb.Chat) -> errors.InvalidRequest:
    with pytest.raises(errors.InvalidRequest) as caught:
        check_request(pb.GenerateRequest(chat=chat))
    return caught.value


@pytest.mark.parametrize(("chat", "field", "reported"), REJECTED)
def test_an_invalid_field_is_named_with_its_place(chat: pb.Chat, field: str, reported: str) -> None:
    error = complaint(chat)

    assert error.field == field
    assert re.search(reported, error.message)
    assert len(error.message) < 400
    with pytest.raises(errors.InvalidRequest):
        check_tokenize(tokenizer_pb.CountTokensRequest(chat=chat))


def test_a_conversation_with_all_that_is_allowed_is_accepted() -> None:
    chat = asked(
        tool(OBJECT),
        tool("", "get-it.now_2"),
        tool(nested(MAX_DEPTH), "n" * 64),
        tool_choice=pb.ToolChoice(name="f"),
        parallel_tool_calls=False,
    )
    calls = [call('{"a": 1}', id="1" * 128), call(), call("{}", name="gone"), *[call()] * 125]
    chat.messages.add(role="assistant", tool_calls=calls, reasoning="think", name="me")
    chat.messages.add(role="tool", tool_call_id="1" * 128)
    chat.messages.add(role="tool", content="x", name="n" * 64)
    check_request(pb.GenerateRequest(chat=chat))

    for mode in (pb.TOOL_MODE_NONE, pb.TOOL_MODE_UNSPECIFIED):
        check_request(pb.GenerateRequest(chat=asked(**choice(mode=mode))))
    check_request(pb.GenerateRequest(chat=asked(tool(), **choice(mode=pb.TOOL_MODE_AUTO))))


def test_all_calls_of_a_conversation_are_bounded_together() -> None:
    chat = asked()
    for _ in range(33):
        chat.messages.add(role="assistant", tool_calls=[call()] * 128)
    chat.messages.add(role="user", content="x")

    assert complaint(chat).field == "chat.messages[33].tool_calls"


def test_a_message_that_ends_with_calls_cannot_be_continued() -> None:
    chat = asked(continue_final_message=True)
    chat.messages.add(role="assistant", content="I", tool_calls=[call()])

    assert complaint(chat).field == "chat.continue_final_message"


class _Counting:
    """Counts the bytes of JSON that are read."""

    def __init__(self, read: Callable[..., Any]) -> None:
        self._read = read
        self.bytes = 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.bytes += len(text)
        return self._read(text, **options)


def test_the_event_loop_reads_little_json_and_the_rest_is_left_to_the_batchers_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counting = _Counting(json.loads)
    monkeypatch.setattr(json, "loads", counting)
    long = nested(2, '"' + "x" * 60_000 + '"')
    chat = asked(*(tool(long, f"f{number}") for number in range(16)), tool("{", "broken"))
    for _ in range(20):
        chat.messages.add(role="assistant", tool_calls=[call(long[:50_000])] * 4)
    chat.messages.add(role="user", content="x")

    check_request(pb.GenerateRequest(chat=chat))

    assert counting.bytes <= READ_AT_ONCE
    with pytest.raises(errors.InvalidRequest) as caught:
        parameters_of_tool(chat.tools[16], 16)
    assert caught.value.field == "chat.tools[16].parameters"


@given(text=st.text(max_size=30) | st.text('{}[]":,1e\\\ud7ffu', max_size=30))
def test_any_text_is_an_object_or_an_error(text: str) -> None:
    read = None
    with suppress(errors.InvalidRequest):
        read = arguments_of_call(pb.ToolCall(arguments=text), 0, 0)

    assert read is None or read == (json.loads(text) if text else {})


def test_the_order_of_names_is_kept_and_empty_parameters_are_an_object_without_properties() -> None:
    assert list(parameters_of_tool(tool('{"z": 1, "a": 2}'), 0)) == ["z", "a"]
    assert parameters_of_tool(tool(), 0) == {"type": "object", "properties": {}}
