"""Calls of tools obey the contract, however an upstream sends them."""

from __future__ import annotations

from typing import Any

import pytest

from headrace import errors
from headrace.upstream.api.calls import MAX_ARGUMENTS
from tests.upstream.api.answering import call, calls_of, chunk, read, reader
from tests.upstream.api.asking import HELLO, TIME, WEATHER

TOOLS: dict[str, Any] = {"tools": [TIME, WEATHER]}
END = chunk(finish="tool_calls")


def parts(*calls: Any) -> dict[str, Any]:
    return chunk(tool_calls=list(calls))


def test_a_call_of_openai() -> None:
    events = [
        chunk(role="assistant", content=None),
        parts(call(0, "call_a", "get_weather", "")),
        parts(call(0, arguments='{"city"')),
        parts(call(0, arguments=': "Oslo"}')),
        END,
    ]

    _, deltas, _ = read(events, chat=TOOLS)

    assert calls_of(deltas) == [("call_a", "get_weather", '{"city": "Oslo"}')]
    assert [delta.token_count for delta in deltas] == [1, 1, 1]


@pytest.mark.parametrize("choice", [{"mode": "TOOL_MODE_REQUIRED"}, {"name": "get_time"}])
@pytest.mark.parametrize(("finish", "complete"), [("stop", False), ("length", True)])
def test_an_answer_without_a_required_call_is_lost(
    choice: dict[str, Any], finish: str, complete: bool
) -> None:
    """llama.cpp ignores tools if the chat template of the model does."""
    reading = reader(chat={**TOOLS, "tool_choice": choice})
    reading.read(chunk(content="No."))

    if complete:
        reading.read(chunk(finish=finish))
        return
    with pytest.raises(errors.UpstreamLost, match="without the call of a tool"):
        reading.read(chunk(finish=finish))


# What servers send for two calls, and the ids that come out.
TWO: list[tuple[list[dict[str, Any]], list[str]]] = [
    ([parts(call(0, "a", "get_time", "{}"), call(1, "b", "get_weather", "{}"))], ["a", "b"]),
    (
        [
            parts(call(0, "a", "get_time", "{")),
            parts(call(0, arguments="}")),
            parts(call(1, "b", "get_weather", "{}")),
        ],
        ["a", "b"],
    ),
    # Without indices.
    ([parts(call(None, "a", "get_time", "{}"), call(None, "b", "get_weather", "{}"))], ["a", "b"]),
    # All with the same index.
    ([parts(call(0, "a", "get_time", "{}")), parts(call(0, "b", "get_weather", "{}"))], ["a", "b"]),
    # With indices that begin at another number.
    ([parts(call(1, "a", "get_time", "{}")), parts(call(2, "b", "get_weather", "{}"))], ["a", "b"]),
    # With id and name in each part.
    (
        [
            parts(call(0, "a", "get_time", "{")),
            parts(call(0, "a", "get_time", "}")),
            parts(call(1, "b", "get_weather", "{}")),
        ],
        ["a", "b"],
    ),
    # Arguments as an object, or none.
    ([parts(call(0, "a", "get_time", {}), call(1, "b", "get_weather"))], ["a", "b"]),
    # Without ids, with an empty one, or twice the same.
    ([parts(call(0, None, "get_time", "{}"), call(1, "", "get_weather", "{}"))], ["call_", "call_"]),
    ([parts(call(None, None, "get_time", "{}"), call(None, None, "get_weather", "{}"))], ["call_", "call_"]),
    ([parts(call(0, "a", "get_time", "{}"), call(1, "a", "get_weather", "{}"))], ["a", "call_"]),
    ([parts(call(0, "x" * 129, "get_time", "{}"), call(1, "b", "get_weather", "{}"))], ["call_", "b"]),
]


@pytest.mark.parametrize("row", TWO)
def test_two_calls(row: tuple[list[dict[str, Any]], list[str]]) -> None:
    events, ids = row

    _, deltas, _ = read([*events, END], chat=TOOLS)

    calls = calls_of(deltas)
    assert [name for _, name, _ in calls] == ["get_time", "get_weather"]
    assert [arguments for _, _, arguments in calls] == ["{}", "{}"]
    assert len({id for id, _, _ in calls}) == 2
    for (id, _, _), wanted in zip(calls, ids, strict=True):
        assert id == wanted or (wanted == "call_" and id.startswith("call_") and len(id) == 29)


def test_a_made_id_is_another_one_in_each_turn() -> None:
    """Ids are unique in a conversation."""
    first = calls_of(read([parts(call(0, None, "get_time", "{}")), END], chat=TOOLS)[1])[0][0]
    called = {"role": "assistant", "tool_calls": [{"id": first, "name": "get_time"}]}
    chat = {**TOOLS, "messages": [HELLO, called, HELLO]}

    second = calls_of(read([parts(call(0, first, "get_time", "{}")), END], chat=chat)[1])[0][0]

    assert second != first


def test_text_and_calls_may_alternate() -> None:
    events = [
        chunk(content="Let me see."),
        parts(call(0, "a", "get_time", "{}")),
        chunk(content="Done."),
        END,
    ]

    _, deltas, _ = read(events, chat=TOOLS)

    assert len(deltas) == 3


def test_a_function_call_of_the_first_version_of_the_api() -> None:
    event = chunk(function_call={"name": "get_time", "arguments": "{}"})

    _, deltas, _ = read([event, chunk(finish="function_call")], chat=TOOLS)

    assert [name for _, name, _ in calls_of(deltas)] == ["get_time"]


def test_the_arguments_of_a_call_may_be_cut_off_by_the_limit() -> None:
    _, deltas, _ = read([parts(call(0, "a", "get_time", '{"zo')), chunk(finish="length")], chat=TOOLS)

    assert calls_of(deltas) == [("a", "get_time", '{"zo')]


REJECTED: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    # Not a tool of the request, or not one that it lets the model call.
    (TOOLS, [parts(call(0, "a", "rm", "{}"))]),
    ({}, [parts(call(0, "a", "get_time", "{}"))]),
    ({**TOOLS, "tool_choice": {"mode": "TOOL_MODE_NONE"}}, [parts(call(0, "a", "get_time", "{}"))]),
    ({**TOOLS, "tool_choice": {"name": "get_weather"}}, [parts(call(0, "a", "get_time", "{}"))]),
    # More calls than it lets the model make.
    ({**TOOLS, "parallel_tool_calls": False}, TWO[0][0]),
    (
        {**TOOLS, "tool_choice": {"name": "get_time"}},
        [parts(*[call(None, str(n), "get_time") for n in "ab"])],
    ),
    (TOOLS, [parts(*[call(n, str(n), "get_time") for n in range(129)])]),
    # Parts that do not follow each other.
    (TOOLS, [parts(call(0, arguments="{}"))]),
    (TOOLS, [parts(call(0, "a", arguments="{}"))]),
    (TOOLS, [*TWO[0][0], parts(call(0, arguments=" "))]),
    (TOOLS, [*TWO[0][0], parts(call(0, "c", "get_time", "{}"))]),
    # Arguments that are no object, once the call has ended.
    (TOOLS, [parts(call(0, "a", "get_time", "[]")), END]),
    (TOOLS, [parts(call(0, "a", "get_time", '{"zo')), END]),
    (TOOLS, [parts(call(0, "a", "get_time", "[" * 100_000)), END]),
    (TOOLS, [parts(call(0, "a", "get_time", "{"), call(1, "b", "get_time", "{}"))]),
    (TOOLS, [parts(call(0, "a", "get_time", "x" * (MAX_ARGUMENTS + 1)))]),
    # Wrong types.
    (TOOLS, [parts(call("0", "a", "get_time", "{}"))]),  # type: ignore[arg-type]
    (TOOLS, [parts(call(True, "a", "get_time", "{}"))]),
    (TOOLS, [parts({"index": 0, "id": 3, "function": {"name": "get_time"}})]),
    (TOOLS, [parts({"index": 0, "function": {"name": 3}})]),
    (TOOLS, [parts({"index": 0, "function": "get_time"})]),
    (TOOLS, [parts(call(0, "a", "get_time", 3))]),
]


@pytest.mark.parametrize("row", REJECTED)
def test_calls_that_the_contract_does_not_allow_lose_the_answer(
    row: tuple[dict[str, Any], list[Any]],
) -> None:
    chat, events = row
    reading = reader(chat=chat)
    reading.read(chunk(content="a"))

    with pytest.raises(errors.UpstreamLost):
        for event in events:
            reading.read(event)
