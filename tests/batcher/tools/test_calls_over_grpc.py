"""Calls of tools from request to answer: a tier with the echo engine, which follows grammars."""

from __future__ import annotations

import json
from contextlib import aclosing

import pytest

from headrace.batcher.text.tokens import ByteTokenizer
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.batcher.text.test_answers import joined
from tests.tier import Tier, running_tier

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ARGUMENTS = '{"city": "Bonn", "days": 3}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


def asked(content: str, mode: pb.ToolMode.ValueType = pb.TOOL_MODE_AUTO) -> pb.GenerateRequest:
    request = pb.GenerateRequest(sampling=pb.Sampling(seed=7, max_tokens=400, temperature=0))
    request.chat.messages.add(role="user", content=content)
    request.chat.tools.add(name="weather", parameters=json.dumps(SCHEMA))
    request.chat.tools.add(name="time")
    request.chat.tool_choice.mode = mode
    request.stream.include_token_ids = True
    request.stream.flush_tokens = 1
    return request


async def answer(tier: Tier, request: pb.GenerateRequest) -> tuple[list[pb.Delta], pb.Finish]:
    deltas, finish = [], pb.Finish()
    async with aclosing(tier.client.generate(request, timeout=60)) as events:
        async for event in events:
            if event.HasField("delta"):
                deltas.append(event.delta)
            elif event.HasField("finish"):
                finish = event.finish
    return deltas, finish


async def test_a_call_comes_apart_from_the_text() -> None:
    async with running_tier([EchoEngine()]) as tier:
        deltas, finish = await answer(tier, asked(f"I look it up.\n{CALL}\n{CALL}"))

    text, reasoning, calls = joined(deltas)
    assert (text, reasoning) == ("I look it up.", "")
    assert [call[2:] for call in calls] == [("weather", ARGUMENTS)] * 2
    assert finish.reason == pb.FINISH_REASON_STOP


async def test_calls_are_valid_whatever_the_model_prefers() -> None:
    async with running_tier([EchoEngine()]) as tier:
        wrong, _ = await answer(tier, asked(CALL.replace('"Bonn"', "5").replace("3", '"three"')))
        required, _ = await answer(tier, asked("I would rather talk.", pb.TOOL_MODE_REQUIRED))
        none, _ = await answer(tier, asked(CALL, pb.TOOL_MODE_NONE))

    assert joined(none) == (CALL, "", [])
    assert joined(required)[0] == ""
    for _, _, calls in (joined(wrong), joined(required)):
        assert calls
        for _, _, name, arguments in calls:
            values = json.loads(arguments)
            assert (
                values == {} if name == "time" else (type(values["city"]), type(values["days"])) == (str, int)
            )


@pytest.mark.parametrize("offset", [0, 3, 30, 60, 90])
async def test_a_call_that_is_resumed_keeps_its_id(offset: int) -> None:
    async with running_tier([EchoEngine()]) as tier:
        whole, _ = await answer(tier, asked(f"I look it up.\n{CALL}\n{CALL}"))
        again = asked(f"I look it up.\n{CALL}\n{CALL}")
        received = [delta for delta in whole if delta.offset < offset]
        again.resume.token_ids.extend(id for delta in received for id in delta.token_ids)
        rest, _ = await answer(tier, again)

    assert len(again.resume.token_ids) >= offset
    assert joined([*received, *rest]) == joined(whole)


async def test_thoughts_come_before_the_answer_and_are_free_of_its_form() -> None:
    async with running_tier([EchoEngine()], tokenizer=ByteTokenizer(reasoning="think")) as tier:
        request = asked('<think>\nA {"city"?\n</think>\n\n42')
        del request.chat.tools[:]
        request.chat.ClearField("tool_choice")
        request.sampling.regex = "[0-9]+"
        deltas, finish = await answer(tier, request)

    assert joined(deltas) == ("42", 'A {"city"?', [])
    assert finish.reason == pb.FINISH_REASON_STOP
