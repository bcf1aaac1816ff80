"""Answers in a form and calls of tools pass through the router; their drafts are judged by form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from headrace import errors
from headrace.client import chat
from headrace.router.answering.cascade import Draft
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect
from tests.router.drafts import CASCADE, PRICES, QUESTION, SAMPLED
from tests.router.fake_batchers import FakeBatcher, routed
from tests.router.rogue import ACCEPTED, FINISH, InvalidBatcher, delta, event, read

SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}}'
TOOL = pb.Tool(name="weather", description="Returns the weather.", parameters=SCHEMA)


def first(index: int, arguments: str = "", **fields: str) -> pb.ToolCallDelta:
    return pb.ToolCallDelta(
        index=index, arguments=arguments, **{"id": f"call-{index}", "name": "weather", **fields}
    )


def more(index: int, arguments: str, **fields: str) -> pb.ToolCallDelta:
    return pb.ToolCallDelta(index=index, arguments=arguments, **fields)


def asks_for_calls() -> pb.GenerateRequest:
    request = chat(QUESTION)
    request.chat.tools.append(TOOL)
    return request


def asks_for_json() -> pb.GenerateRequest:
    return chat(QUESTION, json_schema=SCHEMA)


@dataclass
class FormBatcher(FakeBatcher):
    """Answers every request with these deltas, of one token each.

    logprob   of each token; None: the engine reports none
    """

    deltas: Sequence[pb.Delta] = ()
    reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP
    breaks_at: list[int] = field(default_factory=list)
    logprob: float | None = None

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        if self.refuses:
            await self._fail(self.refuses, context)
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id=request.request_id, model=self.model))
        breaks = self.breaks_at.pop(0) if self.breaks_at else None
        for place in range(len(request.resume.token_ids), len(self.deltas)):
            if place == breaks:
                await self._fail("broken", context)
            response = pb.GenerateResponse(delta=self.deltas[place])
            response.delta.offset, response.delta.token_count = place, 1
            response.delta.token_ids.append(place)
            if self.logprob is not None and request.sampling.logprobs:
                response.delta.logprobs.append(self.logprob)
            yield response
        yield pb.GenerateResponse(finish=pb.Finish(reason=self.reason))


CALL = (
    pb.Delta(reasoning="They ask for "),
    pb.Delta(reasoning="a city."),
    pb.Delta(text="Let me look. "),
    pb.Delta(tool_calls=[first(0, "{")]),
    pb.Delta(tool_calls=[more(0, '"city": "Paris"}'), first(1)]),
    pb.Delta(tool_calls=[more(1, '{"city": "Rome"}')]),
)
JSON = (pb.Delta(text='{"city": '), pb.Delta(text='"Paris"'), pb.Delta(text="}"))


async def test_fields_of_the_request_and_parts_of_the_answer_pass_through_unchanged() -> None:
    fake = FormBatcher(deltas=CALL)
    request = asks_for_calls()
    request.sampling.json_schema = SCHEMA
    request.chat.tool_choice.name = "weather"
    request.chat.parallel_tool_calls = False
    request.stream.flush_tokens = 1
    request.chat.messages.add(role="assistant").tool_calls.add(id="1", name="weather", arguments="{}")
    request.chat.messages.add(role="tool", content="sunny", tool_call_id="1", name="weather")
    async with routed(only=fake) as client:
        events = await read(client, request)

    (received,) = fake.requests
    assert received.chat == request.chat
    assert received.sampling.json_schema == SCHEMA
    parts = [event.delta for event in events[1:-1]]
    assert "".join(part.reasoning for part in parts) == "They ask for a city."
    assert "".join(part.text for part in parts) == "Let me look. "
    assert [list(part.tool_calls) for part in parts] == [list(part.tool_calls) for part in CALL]


async def test_a_call_that_lost_its_batcher_continues_where_it_was() -> None:
    fakes = [FormBatcher(deltas=CALL, breaks_at=[cut]) for cut in range(len(CALL))]
    for fake in fakes:
        request = asks_for_calls()
        request.stream.flush_tokens = 1
        async with routed(only=[fake, FormBatcher(deltas=CALL, running=9)]) as client:
            events = await read(client, request)

        parts = [event.delta for event in events[1:-1]]
        assert [list(part.tool_calls) for part in parts] == [list(part.tool_calls) for part in CALL]


HELD = delta(1, text="", token_count=0, token_ids=[], tool_calls=[more(0, "}")])


@pytest.mark.parametrize(
    "wrong",
    [
        [more(0, "{}")],
        [first(1)],
        [first(0, name="")],
        [first(0, id="i" * 200)],
        [first(0, name="n" * 100)],
        [first(0), first(0, id="other")],
        [first(0), first(2)],
        [first(0), first(1), more(0, "{}")],
        [first(0), more(0, "{}", name="weather")],
    ],
)
async def test_parts_of_calls_that_do_not_follow_each_other_lose_the_batcher(
    wrong: list[pb.ToolCallDelta],
) -> None:
    rogue = InvalidBatcher(script=[ACCEPTED, delta(0, tool_calls=wrong), FINISH])
    other = FormBatcher(deltas=CALL, running=9)
    async with routed(only=[rogue, other]) as client:
        answer = await collect(client, asks_for_calls())

    assert answer.tokens == len(CALL)
    assert len(rogue.requests) == len(other.requests) == 1


async def test_a_call_that_was_not_asked_for_loses_the_batcher() -> None:
    rogue = InvalidBatcher(script=[ACCEPTED, delta(0, tool_calls=[first(0)]), FINISH])
    async with routed(only=[rogue, FakeBatcher(running=9)]) as client:
        answer = await collect(client, chat("a"))

    assert answer.text == "a"


async def test_a_part_that_was_held_back_until_a_lost_finish_is_delivered_once() -> None:
    begun = delta(0, text="", tool_calls=[first(0, "{")])
    lost = InvalidBatcher(script=[ACCEPTED, begun, HELD])
    other = InvalidBatcher(script=[ACCEPTED, HELD, FINISH], running=9)
    async with routed(only=[lost, other]) as client:
        events = await read(client, asks_for_calls())

    parts = [part for event in events for part in event.delta.tool_calls]
    assert "".join(part.arguments for part in parts) == "{}"


async def test_a_caller_that_resumes_in_the_middle_of_a_call_receives_the_rest() -> None:
    async with routed(only=FormBatcher(deltas=CALL)) as client:
        request = asks_for_calls()
        request.sampling.seed = 1
        request.routing.model = "echo"
        request.stream.flush_tokens = 1
        request.resume.token_ids.extend(range(5))
        events = await read(client, request)

    assert [list(event.delta.tool_calls) for event in events[1:-1]] == [list(CALL[5].tool_calls)]


LACKS = errors.InvalidSampling("not supported", field="sampling.json_schema", feature="structured")
BAD_SCHEMA = errors.InvalidSampling("'not' cannot be enforced", field="sampling.json_schema")


async def test_a_tier_that_cannot_enforce_a_form_is_replaced_by_another() -> None:
    small, large = FormBatcher(refuses=LACKS), FormBatcher(deltas=JSON)
    async with routed({"thresholds": "0.99"}, small=small, large=large) as client:
        answer = await collect(client, asks_for_json())
        pinned = asks_for_json()
        pinned.routing.tier = "small"
        with pytest.raises(errors.InvalidSampling, match="not supported"):
            await collect(client, pinned)

    assert (answer.accepted.tier, answer.text) == ("large", '{"city": "Paris"}')


async def test_a_schema_that_a_tier_rejects_ends_the_request() -> None:
    small, large = FormBatcher(refuses=BAD_SCHEMA), FormBatcher(deltas=JSON)
    async with routed({"thresholds": "0.99"}, small=small, large=large) as client:
        with pytest.raises(errors.InvalidSampling, match="cannot be enforced") as raised:
            await collect(client, asks_for_json())

    assert raised.value.field == "sampling.json_schema"
    assert not large.requests


# Drafts.


async def test_a_draft_with_its_whole_form_is_released_and_nothing_is_generated_twice() -> None:
    for deltas, request in ((JSON, asks_for_json()), (CALL, asks_for_calls())):
        small, large = FormBatcher(deltas=deltas), FormBatcher()
        request.stream.flush_tokens = 1
        async with routed(CASCADE, small=small, large=large) as client:
            events = await read(client, request)

        parts = [event.delta for event in events[1:-1]]
        assert events[0].accepted.tier == "small"
        assert [list(part.tool_calls) for part in parts] == [list(part.tool_calls) for part in deltas]
        assert "".join(part.text for part in parts) == "".join(part.text for part in deltas)
        assert not large.requests


LENGTH = pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("draft", "request_", "deltas"),
    [
        (FormBatcher(deltas=JSON[:2], reason=LENGTH), asks_for_json(), JSON),
        (FormBatcher(deltas=JSON[:2]), asks_for_json(), JSON),
        (FormBatcher(deltas=[pb.Delta(text="ye")], reason=LENGTH), chat(QUESTION, regex="yes|no"), JSON),
        (FormBatcher(deltas=CALL[:4]), asks_for_calls(), CALL),
        (FormBatcher(deltas=CALL, reason=LENGTH), asks_for_calls(), CALL),
    ],
)
async def test_a_draft_without_its_whole_form_is_replaced(
    draft: FormBatcher, request_: pb.GenerateRequest, deltas: Sequence[pb.Delta]
) -> None:
    async with routed(CASCADE, small=draft, large=FormBatcher(deltas=deltas)) as client:
        answer = await collect(client, request_)

    assert answer.accepted.tier == "large"
    assert answer.text == "".join(part.text for part in deltas)
    assert answer.finish.usage.wasted_tokens == len(draft.deltas)


async def test_a_draft_in_a_form_of_which_the_model_is_unsure_is_replaced() -> None:
    """The engine forced the form on it: what it would have written is something else."""
    for deltas, request in ((JSON, asks_for_json()), (CALL, asks_for_calls())):
        large = FormBatcher(deltas=deltas)
        async with routed(CASCADE, small=FormBatcher(deltas=deltas, logprob=-3.0), large=large) as client:
            unsure = await collect(client, request)
        async with routed(CASCADE, small=FormBatcher(deltas=deltas, logprob=-0.01), large=large) as client:
            sure = await collect(client, request)

        assert (unsure.accepted.tier, sure.accepted.tier) == ("large", "small")


async def test_a_draft_in_a_form_is_held_until_its_end() -> None:
    """Its beginning has no form yet, and a text of this length would be checked earlier."""
    long = [pb.Delta(text="["), *(pb.Delta(text="1, ") for _ in range(20)), pb.Delta(text="x")]
    settings = {**CASCADE, "cascade_draft_tokens": 5}
    async with routed(settings, small=FormBatcher(deltas=long), large=FormBatcher(deltas=JSON)) as client:
        answer = await collect(client, asks_for_json())

    assert answer.text == '{"city": "Paris"}'


async def test_text_beside_tools_is_checked_as_text() -> None:
    refusal = [pb.Delta(text="I'm sorry, "), pb.Delta(text="but I cannot help with that.")]
    async with routed(CASCADE, small=FormBatcher(deltas=refusal), large=FormBatcher(deltas=CALL)) as client:
        answer = await collect(client, asks_for_calls())

    assert answer.accepted.tier == "large"


async def test_no_sample_is_drawn_of_an_answer_in_a_form() -> None:
    for request in (asks_for_json(), asks_for_calls()):
        small = FormBatcher(deltas=JSON)
        async with routed(SAMPLED, small=small, large=FormBatcher(deltas=JSON)) as client:
            await collect(client, request)

        assert len(small.requests) == 1


def test_thoughts_are_checked_while_there_is_no_text() -> None:
    draft = Draft()
    draft.take(event(delta=pb.Delta(token_count=1, reasoning="Paris is the capital. It")))
    assert draft.text_to_check() == ("Paris is the capital. ", True)
    draft.take(event(delta=pb.Delta(token_count=1, text="Paris. Or")))
    assert draft.text_to_check() == ("Paris. ", True)


# Shadow answers.


async def test_answers_that_a_judge_cannot_compare_are_not_drawn() -> None:
    settings = {
        "thresholds": "0.999",
        **PRICES,
        "shadow_tier": "large",
        "shadow_share": 1.0,
        "judge": "rules",
    }
    large = FormBatcher(deltas=JSON)
    async with routed(settings, small=FormBatcher(deltas=JSON), large=large) as client:
        await collect(client, asks_for_json())
        await collect(client, asks_for_calls())
        await collect(client, chat("marked"))
        while not large.requests:
            await collect(client, chat("marked"))

    assert {request.chat.messages[0].content for request in large.requests} == {"marked"}
