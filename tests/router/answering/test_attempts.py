"""An answer survives its batcher: no token is lost or repeated, and the number of attempts is bounded."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import errors
from headrace.client import Client
from headrace.router.state.tier_pace import TierPace
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, collect, eventually, prompt
from tests.router.fake_batchers import FakeBatcher, routed

SAID = "all that was said before"


def asking(text: str = SAID, **stream: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=text, stream=pb.StreamOptions(**stream))


async def read(client: Client, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with aclosing(client.generate(request, timeout=PATIENCE, resume=False)) as stream:
        return [response async for response in stream]


async def test_an_answer_resumes_on_another_batcher_at_the_next_token() -> None:
    first, second = FakeBatcher(breaks=[5]), FakeBatcher(running=9)
    async with routed(only=[first, second]) as client:
        answer = await collect(client, prompt(SAID))

    assert answer.text == SAID
    assert answer.ids == list(SAID.encode())
    (before,), (after,) = first.requests, second.requests
    assert list(after.resume.token_ids) == list(SAID[:5].encode())
    assert (before.resume.attempt, after.resume.attempt) == (0, 1)
    assert before.sampling.seed == after.sampling.seed
    assert before.request_id == after.request_id
    assert answer.finish.usage.replayed_tokens == 5
    (charge,) = answer.finish.bill.charges
    assert (charge.attempts, charge.answers) == (2, 1), "each attempt counts"


async def test_only_callers_that_request_token_ids_and_route_changes_receive_them() -> None:
    async with routed(only=[FakeBatcher(breaks=[3]), FakeBatcher(running=9)]) as client:
        silent = await read(client, asking())
    async with routed(only=[FakeBatcher(breaks=[3]), FakeBatcher(running=9)]) as client:
        told = await read(client, asking(include_token_ids=True, include_route_changes=True))

    assert [response.WhichOneof("event") for response in silent].count("route_change") == 0
    assert not any(response.delta.token_ids for response in silent)
    assert "".join(response.delta.text for response in silent) == SAID
    (change,) = [response.route_change for response in told if response.HasField("route_change")]
    assert change.reason == "BATCHER_LOST"
    assert change.attempt == 1
    assert change.to.startswith("127.0.0.1:")
    assert getattr(change, "from") not in ("", change.to)


async def test_replayed_tokens_of_all_attempts_are_billed() -> None:
    fake = FakeBatcher(breaks=[4, 3])
    async with routed(only=fake) as client:
        answer = await collect(client, prompt(SAID))

    assert answer.text == SAID
    assert len(fake.requests) == 3, "the same batcher, which is healthy again after each loss"
    assert answer.finish.usage.replayed_tokens == 4 + 7


async def test_an_answer_that_lost_three_batchers_fails() -> None:
    small, large = FakeBatcher(breaks=[1, 1, 1, 1]), FakeBatcher()
    async with routed(small=small, large=large) as client:
        with pytest.raises(errors.BatcherLost, match="'small' lost 3 batchers"):
            await collect(client, prompt("Hi!"))

    assert len(small.requests) == 3
    assert large.requests == [], "an answer that has begun stays on its model"


async def test_a_request_that_killed_its_workers_is_not_sent_to_other_batchers() -> None:
    killer, other = (
        FakeBatcher(breaks=[1], breaks_with=errors.WorkerLost("two workers died")),
        FakeBatcher(running=9),
    )
    async with routed(only=[killer, other]) as client:
        with pytest.raises(errors.WorkerLost):
            await collect(client, prompt(SAID))

    assert other.requests == []


async def test_draining_batchers_do_not_count_as_lost() -> None:
    draining = FakeBatcher(breaks=[1, 1, 1, 1], breaks_with=errors.Draining("stopping", retry_after=0.01))
    async with routed(only=draining) as client:
        answer = await collect(client, prompt(SAID))

    assert answer.text == SAID
    assert len(draining.requests) == 5


async def test_an_answer_that_gets_no_token_from_draining_batchers_fails() -> None:
    """Without the limit it would try until the deadline."""
    draining = FakeBatcher(breaks=[0] * 1000, breaks_with=errors.Draining("stopping"))
    async with routed(only=draining) as client:
        with pytest.raises(errors.BatcherLost, match="lost 9 batchers"):
            await collect(client, prompt(SAID))

    assert len(draining.requests) == 9


async def test_an_answer_resumes_elsewhere_if_its_batcher_is_stalled() -> None:
    hanging, other = FakeBatcher(hangs=True), FakeBatcher(running=9)
    async with routed({"poll_seconds": 0.05, "stall_seconds": 0.3}, only=[hanging, other]) as client:
        answer = await collect(client, prompt(SAID))

    assert answer.text == SAID
    assert len(hanging.requests) == len(other.requests) == 1


async def test_a_resumed_answer_keeps_its_deadline() -> None:
    first, second = FakeBatcher(hangs=True), FakeBatcher(running=9)
    async with routed({"poll_seconds": 0.05, "stall_seconds": 1.5}, only=[first, second]) as client:
        await collect(client, prompt(SAID))

    assert second.time_left[0] <= first.time_left[0] - 0.5


async def test_an_answer_does_not_resume_on_another_model() -> None:
    first, second = FakeBatcher(breaks=[5], model="a"), FakeBatcher(running=9, model="b")
    async with routed(only=[first, second]) as client:
        first.refuses = ""
        answer = await collect(client, prompt(SAID))

    assert answer.text == SAID
    assert len(first.requests) == 2, "it resumed on the right model"


async def test_the_least_busy_batcher_gets_the_request() -> None:
    busy, idle = FakeBatcher(running=7), FakeBatcher(running=2)
    async with routed(only=[busy, idle]) as client:
        for _ in range(4):
            await collect(client, prompt("x"))

    assert (len(busy.requests), len(idle.requests)) == (0, 4)


async def test_a_full_batcher_is_replaced_by_another_of_its_tier() -> None:
    full, other = FakeBatcher(refuses=errors.Overloaded("full", retry_after=3)), FakeBatcher(running=9)
    large = FakeBatcher()
    async with routed(small=[full, other], large=large) as client:
        await collect(client, prompt("Hi!"))

    assert (len(full.requests), len(other.requests), len(large.requests)) == (1, 1, 0)


async def test_a_full_tier_is_replaced_by_another_tier() -> None:
    small, large = FakeBatcher(refuses=errors.Overloaded("full", retry_after=3)), FakeBatcher()
    async with routed(small=small, large=large) as client:
        request = prompt("Hi!")
        request.stream.include_route_changes = True
        events = await read(client, request)

        request.routing.allow_escalation = False
        with pytest.raises(errors.Overloaded) as caught:
            await read(client, request)

    assert caught.value.retry_after == 3
    assert [event.WhichOneof("event") for event in events[:2]] == ["accepted", "route_change"]
    change = events[1].route_change
    assert (getattr(change, "from"), change.to, change.reason) == ("small", "large", "QUEUE_FULL")


async def test_a_request_that_resumes_stays_on_its_tier() -> None:
    small, large = FakeBatcher(refuses="broken"), FakeBatcher()
    async with routed(small=small, large=large) as client:
        request = prompt("Hi!")
        request.resume.token_ids.append(ord("H"))
        with pytest.raises(errors.NoWorkers):
            await collect(client, request)

    assert large.requests == []


async def test_the_pace_counts_only_the_new_tokens_of_a_resumed_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after the loss of a router: the batcher timed only the two missing tokens of 24."""
    taught: list[dict[str, float]] = []
    monkeypatch.setattr(TierPace, "record", lambda self, now, **told: taught.append(told))
    timing = pb.Timing()
    timing.first_token.FromMilliseconds(500)
    timing.decode.FromMilliseconds(111)
    request = prompt(SAID)
    request.resume.token_ids.extend(SAID[:-2].encode())
    async with routed(only=FakeBatcher(timing=timing)) as client:
        answer = await collect(client, request)

    assert answer.finish.usage.completion_tokens == len(SAID)
    assert taught == [{"first_seconds": 0.5, "decode_seconds": 0.111, "timed_tokens": 2, "tokens": len(SAID)}]


async def test_all_attempts_are_one_trace(spans: InMemorySpanExporter) -> None:
    async with routed(only=[FakeBatcher(breaks=[2]), FakeBatcher(running=9)]) as client:
        with trace.get_tracer("test").start_as_current_span("caller") as caller:
            await collect(client, prompt(SAID))
    ours = caller.get_span_context().trace_id

    def attempts() -> list[object]:
        return [
            dict(span.attributes or {})["headrace.attempt"]
            for span in spans.get_finished_spans()
            if span.context is not None
            and span.context.trace_id == ours
            and "headrace.attempt" in (span.attributes or {})
        ]

    await eventually(lambda: len(attempts()) == 2)
    assert sorted(map(str, attempts())) == ["0", "1"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(codec="ascii"), min_size=1, max_size=40),
    breaks=st.lists(st.integers(0, 12), max_size=2),
    pieces=st.integers(1, 5),
)
async def test_the_answer_is_complete_wherever_its_streams_break(
    text: str, breaks: list[int], pieces: int
) -> None:
    async with routed(only=FakeBatcher(breaks=breaks, pieces=pieces)) as client:
        answer = await collect(client, prompt(text))

    assert answer.text == text
    assert answer.ids == list(text.encode())


async def test_a_batcher_stays_healthy_after_one_late_reply_to_a_poll() -> None:
    fake = FakeBatcher()
    async with routed({"poll_seconds": 0.05, "stall_seconds": 60}, only=fake) as client:
        fake.requests.append(pb.GenerateRequest())
        fake.hangs = True
        polls = fake.polls
        async with asyncio.timeout(PATIENCE):
            while fake.polls < polls + 2:  # one of these has timed out
                await asyncio.sleep(0.01)

        assert (await client.list_tiers()).tiers[0].healthy
