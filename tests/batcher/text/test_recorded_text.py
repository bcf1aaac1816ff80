"""Spans contain prompts and answers only if a batcher is asked to record them, and then within limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import errors
from headrace.batcher.text.recorded_text import MAX_CHARACTERS, OMITTED, RecordedText
from headrace.client import chat
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect, eventually, prompt, running_mesh

SECRET = "a secret of the caller "


def parts(attribute: Any) -> list[tuple[str, str]]:
    """Return role and text of each message."""
    return [(message["role"], message["parts"][0]["content"]) for message in json.loads(attribute)]


async def ignore(response: pb.GenerateResponse) -> None:
    """Write nowhere."""


async def test_no_span_contains_text_unless_it_is_asked_for(spans: InMemorySpanExporter) -> None:
    """Neither of answers, nor of requests that fail, in any attribute, event or status."""
    async with running_mesh("only") as mesh:
        await collect(mesh.client, chat(SECRET))
        for refused in (chat(SECRET, top_p=9), chat([(SECRET, SECRET)]), prompt(SECRET * 10_000)):
            with pytest.raises(errors.HeadraceError):
                await collect(mesh.client, refused)
        await eventually(lambda: not mesh.left_behind)
        await eventually(lambda: any(s.name == "worker.decode" for s in spans.get_finished_spans()))

    assert len(spans.get_finished_spans()) > 10
    assert not [span.name for span in spans.get_finished_spans() if "secret" in span.to_json()]


async def test_a_batcher_that_is_asked_to_records_prompt_and_answer(spans: InMemorySpanExporter) -> None:
    async with running_mesh("only", batcher_settings={"trace_content": True}) as mesh:
        answer = await collect(mesh.client, chat([("user", "one"), ("assistant", "two"), ("user", SECRET)]))
        await eventually(lambda: not mesh.left_behind)

    (recorded,) = [dict(s.attributes or {}) for s in spans.get_finished_spans() if "secret" in s.to_json()]
    assert parts(recorded["gen_ai.input.messages"]) == [
        ("user", "one"),
        ("assistant", "two"),
        ("user", SECRET),
    ]
    assert parts(recorded["gen_ai.output.messages"]) == [("assistant", answer.text)]
    assert json.loads(str(recorded["gen_ai.output.messages"]))[0]["finish_reason"] == "stop"


async def test_the_end_of_a_conversation_and_the_beginning_of_an_answer_are_kept() -> None:
    request = chat([("user", "first"), ("assistant", "b" * MAX_CHARACTERS), ("user", "last")])
    text = RecordedText(request, ignore)
    for _ in range(3):
        await text.write(pb.GenerateResponse(delta=pb.Delta(text="y" * (MAX_CHARACTERS // 2 + 1))))

    made = text.attributes()
    kept = "b" * (MAX_CHARACTERS - len("last"))
    assert parts(made["gen_ai.input.messages"]) == [("assistant", OMITTED + kept), ("user", "last")]
    assert parts(made["gen_ai.output.messages"]) == [("assistant", "y" * MAX_CHARACTERS + OMITTED)]
    long = RecordedText(pb.GenerateRequest(prompt="a" * MAX_CHARACTERS + "z"), ignore).attributes()
    assert parts(long["gen_ai.input.messages"]) == [("user", OMITTED + "a" * (MAX_CHARACTERS - 1) + "z")]


async def test_calls_results_and_thoughts_are_parts_of_their_messages() -> None:
    request = chat([("user", "Weather?"), ("assistant", ""), ("tool", "sunny")])
    request.chat.messages[1].reasoning = "I call."
    request.chat.messages[1].tool_calls.add(id="call_1", name="weather", arguments='{"city": "Bonn"}')
    request.chat.messages[2].tool_call_id = "call_1"
    text = RecordedText(request, ignore)
    for part in (
        pb.ToolCallDelta(index=0, id="call_2", name="now", arguments="{"),
        pb.ToolCallDelta(index=0, arguments="}"),
        pb.ToolCallDelta(index=1, id="call_3", name="weather", arguments='{"cit'),
    ):
        await text.write(pb.GenerateResponse(delta=pb.Delta(reasoning="Hm. ", tool_calls=[part])))

    made = text.attributes()
    assert [message["parts"] for message in json.loads(made["gen_ai.input.messages"])][1:] == [
        [
            {"type": "reasoning", "content": "I call."},
            {"type": "tool_call", "id": "call_1", "name": "weather", "arguments": {"city": "Bonn"}},
        ],
        [{"type": "tool_call_response", "id": "call_1", "response": "sunny"}],
    ]
    assert json.loads(made["gen_ai.output.messages"])[0]["parts"] == [
        {"type": "reasoning", "content": "Hm. Hm. Hm. "},
        {"type": "tool_call", "id": "call_2", "name": "now", "arguments": {}},
        {"type": "tool_call", "id": "call_3", "name": "weather", "arguments": '{"cit'},
    ]
