"""Drafts are judged before anything is released: released as they are, or replaced unseen, never both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import errors
from headrace.client import Client, chat
from headrace.router.answering.cascade import Draft, Judge, cascade
from headrace.routing.drafts.check import Check, DraftChecker, load
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, Answer, collect, eventually
from tests.router.fake_batchers import Front, routed

PRICES = {"prices": "small=1/2,large=10/20"}
CASCADE = {"cascade": True, "thresholds": "0.9", **PRICES}
GOOD = "The capital of France is Paris."
BAD = "I'm sorry, but I cannot help with that."
QUESTION = "What is the capital of France?"


@dataclass
class Speaker(Front):
    """Says its own text, a word a token, whatever it is asked; *cancelled* counts answers nobody wanted.

    sample   what it says to requests for a sample: nothing at all if it is empty, an error if it is one
    waits    it says nothing before so many requests have come
    """

    text: str = GOOD
    logprob: float = -0.01
    length: bool = False
    cancelled: int = 0
    fails_after: int | None = None
    sample: str | errors.HeadraceError | None = None
    cached: int = 0
    waits: int = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        if self.refuses:
            await self._fail(self.refuses, context)
        text = self.text
        sample = self.sample if request.request_id.endswith("-sample") else None
        ended = False
        try:
            yield pb.GenerateResponse(
                accepted=pb.Accepted(
                    request_id=request.request_id, model=self.model, prompt_tokens=10, seed=1
                )
            )
            if isinstance(sample, errors.HeadraceError):
                ended = True
                raise sample
            if sample is not None:
                text = sample
            if not text:
                await asyncio.Event().wait()
            await eventually(lambda: len(self.requests) >= self.waits)
            words = text.split(" ")
            for place, word in enumerate(words):
                if place == self.fails_after:
                    ended = True
                    raise errors.SequenceFault("the engine failed on this request")
                delta = pb.Delta(offset=place, token_count=1, text=word if place == 0 else f" {word}")
                delta.token_ids.append(place)
                if request.sampling.logprobs:
                    delta.logprobs.append(self.logprob)
                yield pb.GenerateResponse(delta=delta)
            ended = True
        finally:
            self.cancelled += not ended
        reason = pb.FINISH_REASON_LENGTH if self.length else pb.FINISH_REASON_STOP
        usage = pb.Usage(prompt_tokens=10, cached_tokens=self.cached, completion_tokens=len(words))
        yield pb.GenerateResponse(finish=pb.Finish(reason=reason, usage=usage))


async def events_of(client: Client, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with aclosing(client.generate(request, timeout=PATIENCE)) as stream:
        return [response async for response in stream]


def charges(answer: Answer) -> dict[str, tuple[int, int, int, int]]:
    return {
        charge.tier: (charge.attempts, charge.prompt_tokens, charge.completion_tokens, charge.wasted_tokens)
        for charge in answer.finish.bill.charges
    }


async def test_a_good_draft_is_released_and_nothing_is_generated_twice() -> None:
    small, large = Speaker(), Speaker()
    async with routed(CASCADE, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == GOOD
    assert answer.accepted.tier == "small"
    assert answer.logprobs == [], "the judge reads them; the caller has not asked for them"
    assert small.requests[0].sampling.logprobs
    assert large.requests == []
    assert charges(answer) == {"small": (1, 10, 6, 0)}
    assert answer.finish.bill.cost == pytest.approx((10 * 1 + 6 * 2) / 1e6)
    assert answer.finish.bill.largest_tier_cost == pytest.approx((10 * 10 + 6 * 20) / 1e6)


async def test_cached_tokens_of_a_prompt_have_their_own_price_here_and_on_the_largest_tier() -> None:
    prices = {"prices": "small=1/2/0.25,large=10/20/1"}
    words = len(BAD.split())
    small, large = Speaker(text=BAD, cached=8), Speaker(cached=2)
    async with routed({**CASCADE, **prices}, small=small, large=large) as client:
        bill = (await collect(client, chat(QUESTION))).finish.bill
        listed = await client.list_tiers()

    assert [(charge.prompt_tokens, charge.cached_tokens) for charge in bill.charges] == [(10, 8), (10, 2)]
    draft, answer = 2 * 1 + 8 * 0.25 + words * 2, 8 * 10 + 2 * 1 + 6 * 20
    assert bill.cost == pytest.approx((draft + answer) / 1e6)
    assert bill.largest_tier_cost == pytest.approx((2 * 10 + 8 * 1 + 6 * 20) / 1e6), (
        "what the small tier had seen before, the large one alone would have seen"
    )
    assert [tier.price.cached_prompt for tier in listed.tiers] == [0.25, 1]


async def test_a_bad_draft_is_replaced_unseen_and_billed_as_waste(count: Callable[..., float]) -> None:
    drafts = count("headrace.drafts", outcome="escalated")
    wasted = count("headrace.billed_tokens", tier="small")
    small, large = Speaker(text=BAD), Speaker()
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
    assert count("headrace.drafts", outcome="escalated") == drafts + 1
    assert count("headrace.billed_tokens", tier="small") == wasted + 10 + words


async def test_callers_that_asked_are_told_of_the_move() -> None:
    request = chat(QUESTION, logprobs=True)
    request.stream.include_route_changes = True
    async with routed(CASCADE, small=Speaker(text=BAD), large=Speaker()) as client:
        events = await events_of(client, request)

    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["accepted", "route_change", *["delta"] * 6, "finish"]
    moved = events[1].route_change
    assert (getattr(moved, "from"), moved.to, moved.reason) == ("small", "large", "DRAFT_REJECTED")
    assert all(len(event.delta.logprobs) == 1 for event in events[2:-1])


async def test_three_tiers_are_climbed_one_by_one() -> None:
    small, medium, large = Speaker(text=BAD), Speaker(text=BAD), Speaker(text=BAD)
    settings = {"cascade": True, "thresholds": "0.9,0.95"}
    async with routed(settings, small=small, medium=medium, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.accepted.tier == "large", "the last one is not judged: there is none above"
    assert answer.text == BAD
    assert [len(front.requests) for front in (small, medium, large)] == [1, 1, 1]
    assert answer.finish.usage.wasted_tokens == 2 * len(BAD.split())
    assert not answer.finish.bill.HasField("cost"), "no prices, no cost"


async def test_a_draft_is_released_after_all_if_no_larger_tier_serves() -> None:
    large = Speaker(refuses=errors.Overloaded("full", retry_after=1.0))
    async with routed(CASCADE, small=Speaker(text=BAD), large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == BAD
    assert answer.accepted.tier == "small"
    assert charges(answer) == {"small": (1, 10, len(BAD.split()), 0), "large": (1, 0, 0, 0)}


async def test_a_draft_that_fails_is_escalated() -> None:
    async with routed(CASCADE, small=Speaker(fails_after=3), large=Speaker()) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == GOOD
    assert answer.accepted.tier == "large"
    assert charges(answer)["small"] == (1, 10, 0, 3)


async def test_a_draft_that_fails_is_the_callers_error_where_no_other_tier_serves() -> None:
    large = Speaker(refuses=errors.Overloaded("full", retry_after=1.0))
    async with routed(CASCADE, small=Speaker(fails_after=3), large=large) as client:
        with pytest.raises(errors.SequenceFault):
            await collect(client, chat(QUESTION))
        charge = (await client.list_tiers()).bill.charges[0]

    assert (charge.tier, charge.answers, charge.wasted_tokens) == ("small", 0, 3), "it was computed"


async def test_a_draft_is_released_if_a_larger_tier_would_not_be_in_time() -> None:
    large = Speaker(refuses=errors.Unattainable("the queue is longer than the deadline"))
    async with routed(CASCADE, small=Speaker(text=BAD), large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == BAD
    assert answer.accepted.tier == "small"


async def test_a_request_that_kills_workers_is_not_escalated() -> None:
    small = Front(breaks=[0], breaks_with=errors.PoisonRequest("two workers were lost with it"))
    large = Speaker()
    async with routed(CASCADE, small=small, large=large) as client:
        with pytest.raises(errors.PoisonRequest):
            await collect(client, chat(QUESTION))

    assert large.requests == []


@pytest.mark.parametrize("cascade", [True, False])
@pytest.mark.parametrize(
    ("failure", "resume_seconds"),
    [(errors.WorkerLost("three workers were lost with it"), 60), (errors.BatcherLost("it was lost"), 0)],
)
async def test_a_draft_that_was_lost_with_its_workers_ends_as_without_being_held_back(
    failure: errors.HeadraceError, resume_seconds: float, cascade: bool
) -> None:
    small, large = Front(breaks=[2] * 9, breaks_with=failure), Speaker()
    settings = {**CASCADE, "cascade": cascade, "resume_seconds": resume_seconds}
    said: list[pb.GenerateResponse] = []
    async with routed(settings, small=small, large=large) as client:
        with pytest.raises(type(failure)):
            async with aclosing(client.generate(chat(QUESTION), timeout=PATIENCE, resume=False)) as stream:
                async for response in stream:
                    said.append(response)  # noqa: PERF401 - what came before the failure is kept
        (charge,) = (await client.list_tiers()).bill.charges

    assert large.requests == [], "it may be what kills them"
    assert [response.WhichOneof("event") for response in said] == ["accepted", "delta", "delta"]
    assert said[0].accepted.tier == "small"
    assert (charge.tier, charge.answers, charge.completion_tokens, charge.wasted_tokens) == ("small", 1, 2, 0)


async def test_a_draft_outlives_a_larger_tiers_that_was_lost_with_its_workers() -> None:
    lost = Front(breaks=[1], breaks_with=errors.WorkerLost("three workers were lost with it"))
    small, large = Speaker(text=BAD), Speaker()
    settings = {"cascade": True, "thresholds": "0.9,0.95"}
    async with routed(settings, small=small, medium=lost, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.accepted.tier, answer.text) == ("small", BAD)
    assert len(lost.requests) == 1
    assert large.requests == []


async def test_an_escalation_is_booked_for_the_tier_that_answers() -> None:
    """And not for a larger one that was asked and refused."""
    gone: list[tuple[str, str]] = []
    refusing = errors.Overloaded("full")

    async def begin(rejected: Sequence[str]) -> AsyncGenerator[pb.GenerateResponse, None]:
        if len(rejected) == 2:
            raise refusing
        tier = ("small", "medium")[len(rejected)]
        yield pb.GenerateResponse(accepted=pb.Accepted(tier=tier))
        yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP))

    answer = cascade(
        begin,
        lambda: Judge(lambda draft: False, 9),
        lambda draft, tier: gone.append((draft.tier, tier)),
        tier_of=lambda: "large",
        tells_moves=False,
    )
    async with aclosing(answer) as responses:
        said = [response async for response in responses]

    assert said[0].accepted.tier == "medium"
    assert [tier for _, tier in gone] == ["medium"]


async def test_a_long_draft_is_judged_early_and_streams_on_if_it_is_good() -> None:
    long = " ".join(f"Paris has {place} bridges over the river." for place in range(2, 12))
    small, large = Speaker(text=long), Speaker()
    async with routed({**CASCADE, "draft_tokens": 14}, small=small, large=large) as client:
        answer = await collect(client, chat("What do you know of the bridges of Paris?"))

    assert answer.text == long
    assert large.requests == []


async def test_a_long_bad_draft_is_cut_short() -> None:
    small, large = Speaker(text=" ".join([BAD] * 2000)), Speaker()  # far more than is sent before it is cut
    async with routed({**CASCADE, "draft_tokens": 16}, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION))
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
        ({"cascade": True, "cascade_from": 0.8}, pb.Routing()),
    ],
)
async def test_without_leave_to_escalate_the_answer_is_streamed_unjudged(
    settings: dict[str, Any], hints: pb.Routing
) -> None:
    small, large = Speaker(text=BAD), Speaker()
    request = chat(QUESTION)
    request.routing.CopyFrom(hints)
    async with routed({"thresholds": "0.9", **settings}, small=small, large=large) as client:
        answer = await collect(client, request)
        explained = await client.explain(request)

    assert answer.text == BAD
    assert large.requests == []
    assert not explained.cascade


async def test_a_request_may_ask_for_it() -> None:
    request = chat(QUESTION)
    request.routing.cascade = True
    async with routed({"thresholds": "0.9"}, small=Speaker(text=BAD), large=Speaker()) as client:
        answer = await collect(client, request)
        explained = await client.explain(request)

    assert answer.accepted.tier == "large"
    assert explained.cascade


SAMPLED = {**CASCADE, "cascade_sample_seconds": PATIENCE / 3}
SUM = "What is 17 + 25?"


@pytest.mark.parametrize(("length", "draft_tokens"), [(False, 12), (True, 500)])
async def test_a_draft_that_is_judged_before_its_end_is_compared_with_its_sample(
    length: bool, draft_tokens: int
) -> None:
    """Whether it has as many tokens as a draft may have, or as many as the request allows."""
    compared: list[Sequence[str]] = []
    text = "There are 42 of them. That is all. " + "Nothing more is said here. " * 20
    sample = "There are 41. That is so, and it goes on"
    small = Speaker(text=text.strip(), sample=sample, length=length)
    settings = {**SAMPLED, "draft_tokens": draft_tokens}
    with pytest.MonkeyPatch.context() as patched:
        check = DraftChecker.check

        def seen(self: DraftChecker, *texts: str, **evidence: Any) -> Check:
            compared.append(evidence["samples"])
            return check(self, *texts, **evidence)

        patched.setattr(DraftChecker, "check", seen)
        async with routed(settings, small=small, large=Speaker()) as client:
            answer = await collect(client, chat("How many are there?"))

    assert len(small.requests) == 2
    assert compared[0] == (sample,)
    assert answer.finish.usage.wasted_tokens >= words_of(sample)


def words_of(text: str) -> int:
    return len(text.split(" "))


async def released_with(small: Speaker, settings: dict[str, Any]) -> Answer:
    """The answer to a sum for which the small tier's draft needs just what it has to be released."""
    async with routed(settings, small=small, large=Speaker(text="By the large tier: 42")) as client:
        return await collect(client, chat(SUM, temperature=0, max_tokens=40))


async def test_a_sample_that_agrees_lets_a_draft_pass_that_a_differing_one_gives_up() -> None:
    """Release is set between the two verdicts, so that only the sample decides."""
    checker = load()
    logprobs = [-0.01] * 4
    agrees = checker.check(SUM, "The sum is 42.", logprobs=logprobs, samples=["It is 42."]).good
    differs = checker.check(SUM, "The sum is 42.", logprobs=logprobs, samples=["It is 41."]).good
    settings = {**SAMPLED, "cascade_release": (agrees + differs) / 2}

    same = await released_with(Speaker(text="The sum is 42.", sample="It is 42."), settings)
    other = await released_with(Speaker(text="The sum is 42.", sample="It is 41."), settings)

    assert (same.accepted.tier, other.accepted.tier) == ("small", "large")


async def test_a_sample_is_asked_for_with_another_seed_some_warmth_and_few_tokens() -> None:
    small = Speaker(sample="Paris")
    request = chat(QUESTION, temperature=0, max_tokens=500, seed=7, logprobs=True)
    request.stream.include_token_ids = True
    async with routed({**SAMPLED, "draft_tokens": 32}, small=small, large=Speaker()) as client:
        answer = await collect(client, request)

    drafted, sampled = sorted(small.requests, key=lambda asked: asked.request_id.endswith("-sample"))
    assert answer.text == GOOD
    assert drafted.sampling.temperature == 0
    assert drafted.sampling.max_tokens == 500
    assert sampled.request_id == f"{drafted.request_id}-sample"
    assert sampled.sampling.temperature == pytest.approx(0.7)
    assert sampled.sampling.max_tokens == 32
    assert sampled.sampling.seed != drafted.sampling.seed == 7
    assert sampled.chat == drafted.chat
    assert not sampled.sampling.logprobs


async def test_a_sample_is_billed_as_waste_whether_the_draft_is_released_or_not() -> None:
    sample = "It is Paris"
    settings = {**SAMPLED, "cascade_release": 0}
    async with routed(settings, small=Speaker(sample=sample), large=Speaker()) as client:
        released = await collect(client, chat(QUESTION))
    async with routed(SAMPLED, small=Speaker(text=BAD, sample=sample), large=Speaker()) as client:
        escalated = await collect(client, chat(QUESTION))

    assert charges(released) == {"small": (2, 20, 6, 3)}
    assert released.finish.usage.wasted_tokens == 3
    assert charges(escalated) == {"small": (2, 20, 0, words_of(BAD) + 3), "large": (1, 10, 6, 0)}
    assert escalated.finish.usage.wasted_tokens == words_of(BAD) + 3


@pytest.mark.parametrize("sample", [errors.Overloaded("full", retry_after=1.0), errors.SequenceFault("oh")])
async def test_a_draft_whose_sample_fails_is_judged_without_it(sample: errors.HeadraceError) -> None:
    async with routed(SAMPLED, small=Speaker(sample=sample), large=Speaker()) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == GOOD
    assert answer.accepted.tier == "small"
    assert answer.finish.usage.wasted_tokens == 0


async def test_a_sample_that_does_not_come_is_waited_for_no_longer_than_is_set_and_cancelled() -> None:
    small = Speaker(sample="", waits=2)
    async with routed({**CASCADE, "cascade_sample_seconds": 0.05}, small=small, large=Speaker()) as client:
        answer = await collect(client, chat(QUESTION))
        await eventually(lambda: small.cancelled == 1)

    assert answer.text == GOOD
    assert answer.accepted.tier == "small"


async def test_a_caller_who_leaves_takes_draft_and_sample_along() -> None:
    small = Speaker(text="", sample="")
    async with routed(SAMPLED, small=small, large=Speaker()) as client:
        small.text = ""
        stream = client.generate(chat(QUESTION), timeout=PATIENCE)
        waiting = asyncio.ensure_future(anext(stream))
        await eventually(lambda: len(small.requests) == 2)
        waiting.cancel()
        await asyncio.wait([waiting])
        await stream.aclose()
        await eventually(lambda: small.cancelled == 2)
        async with asyncio.timeout(10):
            while not (await client.list_tiers()).bill.charges[0].prompt_tokens:
                await asyncio.sleep(0.01)  # the draft took the prompt in, and that is billed


async def test_no_sample_is_drawn_where_a_draft_is_not_judged_time_is_short_or_others_wait() -> None:
    unjudged = chat(QUESTION)
    unjudged.routing.cascade = False
    small = Speaker(sample=GOOD)
    async with routed({**SAMPLED, "cascade_sample_seconds": 30}, small=small, large=Speaker()) as client:
        await collect(client, unjudged)
        await collect(client, chat(QUESTION), timeout=20)
    busy = Speaker(sample=GOOD, queued=3)
    async with routed(SAMPLED, small=busy, large=Speaker()) as client:
        await collect(client, chat(QUESTION))

    assert len(small.requests) == 2
    assert len(busy.requests) == 1


async def test_draft_check_and_answer_are_spans_of_one_trace(spans: InMemorySpanExporter) -> None:
    async with routed(CASCADE, small=Speaker(text=BAD), large=Speaker()) as client:
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
    assert (check.attributes or {})["headrace.outcome"] == "escalated"
    assert (check.attributes or {})["headrace.check.good"] < 0.5  # type: ignore[operator]
    said = " ".join(str(value) for span in finished for value in (span.attributes or {}).values())
    assert "sorry" not in said, "answers are not in spans"


def test_a_draft_that_goes_on_is_judged_by_its_whole_sentences() -> None:
    draft = Draft("small", text="It is Paris. The second largest ci")
    assert draft.to_judge() == ("It is Paris. ", True)

    draft.text = "It is the cap"
    assert draft.to_judge() == ("It is the cap", False)

    draft.finish = pb.Finish(reason=pb.FINISH_REASON_LENGTH)
    assert draft.to_judge() == ("It is the cap", False)
