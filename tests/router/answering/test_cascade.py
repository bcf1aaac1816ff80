"""Drafts are checked before release: released as they are, or replaced without the caller seeing them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import errors
from headrace.client import Client, chat
from headrace.deadline import Deadline
from headrace.router.answering.attempts import Outgoing
from headrace.router.answering.cascade import Draft, HoldBack, cascade
from headrace.router.state.tiers import Tier, Tiers
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, collect, eventually
from tests.router.drafts import BAD, CASCADE, GOOD, QUESTION, TextBatcher, charges
from tests.router.fake_batchers import FakeBatcher, routed, serving_fake


async def events_of(client: Client, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with aclosing(client.generate(request, timeout=PATIENCE)) as stream:
        return [response async for response in stream]


async def test_a_good_draft_is_released_and_nothing_is_generated_twice() -> None:
    small, large = TextBatcher(), TextBatcher()
    async with routed(CASCADE, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == GOOD
    assert answer.accepted.tier == "small"
    assert answer.logprobs == [], "only the check uses them; the caller did not request them"
    assert small.requests[0].sampling.logprobs
    assert large.requests == []
    assert charges(answer) == {"small": (1, 10, 6, 0)}
    assert answer.finish.bill.cost == pytest.approx((10 * 1 + 6 * 2) / 1e6)
    assert answer.finish.bill.largest_tier_cost == pytest.approx((10 * 10 + 6 * 20) / 1e6)


async def test_cached_tokens_of_a_prompt_have_their_own_price_here_and_on_the_largest_tier() -> None:
    prices = {"prices": "small=1/2/0.25,large=10/20/1"}
    words = len(BAD.split())
    small, large = TextBatcher(text=BAD, cached=8), TextBatcher(cached=2)
    async with routed({**CASCADE, **prices}, small=small, large=large) as client:
        bill = (await collect(client, chat(QUESTION))).finish.bill
        listed = await client.list_tiers()

    assert [(charge.prompt_tokens, charge.cached_tokens) for charge in bill.charges] == [(10, 8), (10, 2)]
    draft, answer = 2 * 1 + 8 * 0.25 + words * 2, 8 * 10 + 2 * 1 + 6 * 20
    assert bill.cost == pytest.approx((draft + answer) / 1e6)
    assert bill.largest_tier_cost == pytest.approx((2 * 10 + 8 * 1 + 6 * 20) / 1e6), (
        "prompt tokens cached on the small tier would be cached on the large one"
    )
    assert [tier.price.cached_prompt for tier in listed.tiers] == [0.25, 1]


async def test_a_bad_draft_is_replaced_and_billed_as_waste(count: Callable[..., float]) -> None:
    drafts = count("headrace.drafts", verdict="escalated")
    discarded = count("headrace.tokens.wasted", tier="small", cause="draft")
    wasted = count("headrace.billed_tokens", tier="small")
    small, large = TextBatcher(text=BAD), TextBatcher()
    async with routed(CASCADE, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION))
        listed = await client.list_tiers()

    words = len(BAD.split())
    assert answer.text == GOOD
    assert answer.accepted.tier == "large"
    assert answer.finish.usage.wasted_tokens == words
    assert charges(answer) == {"small": (1, 10, 0, words), "large": (1, 10, 6, 0)}
    cost = (10 * 1 + words * 2 + 10 * 10 + 6 * 20) / 1e6
    assert answer.finish.bill.cost == pytest.approx(cost), "the draft is on the bill"
    assert listed.bill.cost == pytest.approx(cost)
    assert count("headrace.drafts", verdict="escalated") == drafts + 1
    assert count("headrace.tokens.wasted", tier="small", cause="draft") == discarded + words
    assert count("headrace.billed_tokens", tier="small") == wasted + 10 + words


async def test_callers_that_request_route_changes_receive_the_escalation() -> None:
    request = chat(QUESTION, logprobs=True)
    request.stream.include_route_changes = True
    request.stream.flush_tokens = 1
    async with routed(CASCADE, small=TextBatcher(text=BAD), large=TextBatcher()) as client:
        events = await events_of(client, request)

    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["accepted", "route_change", *["delta"] * 6, "finish"]
    moved = events[1].route_change
    assert (getattr(moved, "from"), moved.to, moved.reason) == ("small", "large", "DRAFT_REJECTED")
    assert all(len(event.delta.logprobs) == 1 for event in events[2:-1])


async def test_three_tiers_are_tried_one_after_the_other() -> None:
    small, medium, large = TextBatcher(text=BAD), TextBatcher(text=BAD), TextBatcher(text=BAD)
    settings = {"cascade": True, "thresholds": "0.9,0.95"}
    async with routed(settings, small=small, medium=medium, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.accepted.tier == "large", "the draft of the largest tier is not checked"
    assert answer.text == BAD
    assert [len(fake.requests) for fake in (small, medium, large)] == [1, 1, 1]
    assert answer.finish.usage.wasted_tokens == 2 * len(BAD.split())
    assert not answer.finish.bill.HasField("cost"), "no prices, no cost"


async def test_a_rejected_draft_is_released_if_no_larger_tier_serves() -> None:
    large = TextBatcher(refuses=errors.Overloaded("full", retry_after=1.0))
    async with routed(CASCADE, small=TextBatcher(text=BAD), large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == BAD
    assert answer.accepted.tier == "small"
    assert charges(answer) == {"small": (1, 10, len(BAD.split()), 0), "large": (1, 0, 0, 0)}


async def test_a_draft_that_fails_is_escalated() -> None:
    async with routed(CASCADE, small=TextBatcher(fails_after=3), large=TextBatcher()) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == GOOD
    assert answer.accepted.tier == "large"
    assert charges(answer)["small"] == (1, 10, 0, 3)


async def test_the_error_of_a_draft_is_returned_if_no_other_tier_serves() -> None:
    large = TextBatcher(refuses=errors.Overloaded("full", retry_after=1.0))
    async with routed(CASCADE, small=TextBatcher(fails_after=3), large=large) as client:
        with pytest.raises(errors.SequenceFault):
            await collect(client, chat(QUESTION))
        charge = (await client.list_tiers()).bill.charges[0]

    assert (charge.tier, charge.answers, charge.wasted_tokens) == ("small", 0, 3), "it was computed"


@pytest.mark.parametrize("error", [errors.TtftUnattainable, errors.DeadlineUnattainable])
async def test_a_draft_is_released_if_a_larger_tier_would_not_be_in_time(
    error: type[errors.HeadraceError],
) -> None:
    large = TextBatcher(refuses=error("the queue is longer than the deadline"))
    async with routed(CASCADE, small=TextBatcher(text=BAD), large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == BAD
    assert answer.accepted.tier == "small"


async def test_a_request_that_kills_workers_is_not_escalated() -> None:
    small = FakeBatcher(breaks=[0], breaks_with=errors.PoisonRequest("two workers were lost with it"))
    large = TextBatcher()
    async with routed(CASCADE, small=small, large=large) as client:
        with pytest.raises(errors.PoisonRequest):
            await collect(client, chat(QUESTION))

    assert large.requests == []


@pytest.mark.parametrize("cascade", [True, False])
@pytest.mark.parametrize(
    ("failure", "failover_seconds"),
    [(errors.WorkerLost("three workers were lost with it"), 60), (errors.BatcherLost("it was lost"), 0)],
)
async def test_a_draft_that_was_lost_with_its_workers_ends_as_without_a_cascade(
    failure: errors.HeadraceError, failover_seconds: float, cascade: bool
) -> None:
    small, large = FakeBatcher(breaks=[2] * 9, breaks_with=failure), TextBatcher()
    settings = {**CASCADE, "cascade": cascade, "failover_seconds": failover_seconds}
    said: list[pb.GenerateResponse] = []
    request = chat(QUESTION)
    request.stream.flush_tokens = 1
    async with routed(settings, small=small, large=large) as client:
        with pytest.raises(type(failure)):
            async with aclosing(client.generate(request, timeout=PATIENCE, resume=False)) as stream:
                async for response in stream:
                    said.append(response)  # noqa: PERF401 - what came before the failure is kept
        (charge,) = (await client.list_tiers()).bill.charges

    assert large.requests == [], "the request may be the cause"
    assert [response.WhichOneof("event") for response in said] == ["accepted", "delta", "delta"]
    assert said[0].accepted.tier == "small"
    assert (charge.tier, charge.answers, charge.completion_tokens, charge.wasted_tokens) == ("small", 1, 2, 0)


async def test_a_draft_is_released_if_a_larger_tiers_draft_was_lost_with_its_workers() -> None:
    lost = FakeBatcher(breaks=[1], breaks_with=errors.WorkerLost("three workers were lost with it"))
    small, large = TextBatcher(text=BAD), TextBatcher()
    settings = {"cascade": True, "thresholds": "0.9,0.95"}
    async with routed(settings, small=small, medium=lost, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.accepted.tier, answer.text) == ("small", BAD)
    assert len(lost.requests) == 1
    assert large.requests == []


class Rejecting:
    """A `Cascaded` request whose drafts are all rejected."""

    def __init__(self, **tiers: Tier) -> None:
        deadline = Deadline.after(PATIENCE, time.monotonic())
        self.outgoing = Outgoing(chat(QUESTION, seed=1), deadline, failover_seconds=0)
        self.outgoing.request.stream.include_route_changes = True
        self.discarded: list[tuple[str, str]] = []
        self._tiers = tiers

    def choose(self, rejected: Sequence[str], failed: Collection[str]) -> Tier:
        names = [name for name in self._tiers if name not in rejected and name not in failed]
        if not names:
            raise errors.NoWorkers("no tier is left")
        return self._tiers[names[0]]

    def count_attempt(self, tier: str) -> None: ...

    def drop_logprobs(self, error: errors.InvalidRequest) -> bool:
        return False

    async def wait_for_recovery(self, failed: Collection[str], began: float) -> bool:
        return False

    def hold_back(self) -> HoldBack:
        return HoldBack(self._tiers["small"], 9, 0.0)

    def releases(self, draft: Draft) -> bool:
        return False

    def discard(self, draft: Draft, replaced_by: str = "") -> None:
        self.discarded.append((draft.tier, replaced_by))


async def test_an_escalation_counts_for_the_tier_that_answers() -> None:
    """And not for a larger one that refused the request."""
    full = FakeBatcher(refuses=errors.Overloaded("full"))
    async with AsyncExitStack() as stack:
        fakes = {"small": FakeBatcher(), "medium": FakeBatcher(), "large": full}
        addresses = {
            name: await stack.enter_async_context(serving_fake(fake)) for name, fake in fakes.items()
        }
        tiers = Tiers([(name, [address]) for name, address in addresses.items()])
        await stack.enter_async_context(tiers.watching())
        request = Rejecting(**{tier.name: tier for tier in tiers.tiers})
        responses = await stack.enter_async_context(aclosing(cascade(request)))
        events = [response async for response in responses]

    assert len(full.requests) == 1
    assert events[0].accepted.tier == "medium"
    assert events[1].route_change.to == "medium"
    assert request.discarded == [("small", "medium")]


async def test_a_long_draft_is_checked_early_and_streamed_if_it_is_good() -> None:
    long = " ".join(f"Paris has {place} bridges over the river." for place in range(2, 12))
    small, large = TextBatcher(text=long), TextBatcher()
    async with routed({**CASCADE, "cascade_draft_tokens": 14}, small=small, large=large) as client:
        answer = await collect(client, chat("What do you know of the bridges of Paris?"))

    assert answer.text == long
    assert large.requests == []


async def test_a_long_bad_draft_is_cut_short() -> None:
    small, large = (
        TextBatcher(text=" ".join([BAD] * 2000)),
        TextBatcher(),
    )  # far more than is sent before it is cancelled
    request = chat(QUESTION)
    request.stream.flush_tokens = 1
    async with routed({**CASCADE, "cascade_draft_tokens": 16}, small=small, large=large) as client:
        answer = await collect(client, request)
        await eventually(lambda: small.cancelled == 1)

    assert answer.text == GOOD
    assert charges(answer)["small"][3] == 16


@pytest.mark.parametrize(
    ("settings", "hints"),
    [
        ({"cascade": False}, pb.Routing()),
        ({"cascade": True}, pb.Routing(cascade=False)),
        ({"cascade": True}, pb.Routing(tier="small")),
        ({"cascade": True}, pb.Routing(max_tier="small")),
        ({"cascade": True}, pb.Routing(allow_escalation=False)),
        ({"cascade": True}, pb.Routing(quality_preference=0)),
        ({"cascade": True, "cascade_min_score": 0.8}, pb.Routing()),
    ],
)
async def test_an_answer_that_may_not_escalate_is_streamed_unchecked(
    settings: dict[str, Any], hints: pb.Routing
) -> None:
    small, large = TextBatcher(text=BAD), TextBatcher()
    request = chat(QUESTION)
    request.routing.CopyFrom(hints)
    async with routed({"thresholds": "0.9", **settings}, small=small, large=large) as client:
        answer = await collect(client, request)
        explained = await client.explain(request)

    assert answer.text == BAD
    assert large.requests == []
    assert not explained.cascade


async def test_a_request_can_enable_the_cascade() -> None:
    request = chat(QUESTION)
    request.routing.cascade = True
    async with routed({"thresholds": "0.9"}, small=TextBatcher(text=BAD), large=TextBatcher()) as client:
        answer = await collect(client, request)
        explained = await client.explain(request)

    assert answer.accepted.tier == "large"
    assert explained.cascade


async def test_draft_check_and_answer_are_spans_of_one_trace(spans: InMemorySpanExporter) -> None:
    async with routed(CASCADE, small=TextBatcher(text=BAD), large=TextBatcher()) as client:
        await collect(client, chat(QUESTION))
        await eventually(lambda: any(span.name == "router.check" for span in spans.get_finished_spans()))

    finished = spans.get_finished_spans()
    (check,) = [span for span in finished if span.name == "router.check"]
    attempts = [
        span
        for span in finished
        if span.parent is not None
        and check.parent is not None
        and span.parent.span_id == check.parent.span_id
        and (span.attributes or {}).get("headrace.tier")
        and span is not check
    ]
    assert [(span.attributes or {})["headrace.tier"] for span in attempts] == ["small", "large"]
    assert {span.context.trace_id for span in attempts} == {check.context.trace_id}
    assert (check.attributes or {})["headrace.verdict"] == "escalated"
    assert (check.attributes or {})["headrace.check.good"] < 0.5  # type: ignore[operator]
    said = " ".join(str(value) for span in finished for value in (span.attributes or {}).values())
    assert "sorry" not in said, "answers are not in spans"


def test_an_unfinished_draft_is_checked_by_its_complete_sentences() -> None:
    draft = Draft("small", text="It is Paris. The second largest ci")
    assert draft.text_to_check() == ("It is Paris. ", True)

    draft.text = "It is the cap"
    assert draft.text_to_check() == ("It is the cap", False)

    draft.finish = pb.Finish(reason=pb.FINISH_REASON_LENGTH)
    assert draft.text_to_check() == ("It is the cap", False)
