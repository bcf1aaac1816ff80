"""A sample of requests is answered again by the other choice, within bounds and apart from callers' bills."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import errors
from headrace.client import chat
from headrace.router.__main__ import router
from headrace.router.changes.answered import Answered
from headrace.router.costs.weighing import Weighing
from headrace.router.settings import Settings
from headrace.router.shadow.bounds import DAY_SECONDS, Bounds
from headrace.router.shadow.shadow import Candidate
from headrace.router.state.bills import Bill
from headrace.router.state.feedback import AnswerRecord, Feedback
from headrace.router.state.thresholds import Thresholds
from headrace.routing.calibration import Calibration, save
from headrace.routing.policy import decide
from headrace.routing.request import Hints, RoutingRequest
from headrace.routing.scoring.conversation import Earlier, Turn
from headrace.routing.scoring.score import Score, fingerprint
from headrace.routing.scoring.scorer import load
from headrace.routing.success.estimate import Estimate
from headrace.routing.tier_view import Price, TierView
from headrace.runtime.serving.server import StartFailed
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, collect, eventually
from tests.router.drafts import BAD, GOOD, QUESTION, TextBatcher
from tests.router.fake_batchers import FakeBatcher, routed

PRICES = "small=1/2,large=10/20"
ALL_TO_SMALL = {"thresholds": "0.999", "prices": PRICES}
SHADOW = {**ALL_TO_SMALL, "shadow_tier": "large", "shadow_share": 1.0}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def shadows(count: Callable[..., float], before: float, many: int = 1, **labels: str) -> None:
    await eventually(lambda: count("headrace.shadow.requests", **labels) >= before + many)


async def test_a_request_is_answered_again_by_the_other_tier_after_its_caller_has_the_answer(
    count: Callable[..., float],
) -> None:
    small, large = FakeBatcher(), FakeBatcher()
    before = count("headrace.shadow.requests", tier="large", outcome="ok")
    async with routed(SHADOW, small=small, large=large) as client:
        request = chat(QUESTION, temperature=0.5, max_tokens=70)
        request.routing.tenant = "A"
        request.routing.session_id = "s"
        request.routing.priority = 9
        request.stream.flush_tokens = 5
        answer = await collect(client, request)
        await shadows(count, before, tier="large", outcome="ok")

    (first,), (second,) = small.requests, large.requests
    assert answer.accepted.tier == "small"
    assert second.chat == first.chat
    assert second.sampling == first.sampling, "same seed, same sampling"
    assert second.request_id == f"{first.request_id}-shadow"
    assert second.routing == pb.Routing(tenant="A", priority=0, cascade=False)
    assert not second.stream.HasField("flush_tokens"), "nobody reads it while it is generated"


async def test_shadow_answers_are_on_no_callers_bill(count: Callable[..., float]) -> None:
    names = ("headrace.cost", "headrace.tenant.cost", "headrace.billed_tokens", "headrace.routed")
    before = {name: count(name) for name in names}
    ended, spent = count("headrace.shadow.requests"), count("headrace.shadow.cost", tier="large")
    async with routed(SHADOW, small=TextBatcher(), large=TextBatcher()) as client:
        answer = await collect(client, chat(QUESTION))
        await shadows(count, ended)
        listed = await client.list_tiers()

    tokens = len(GOOD.split())
    cost = (10 * 1 + tokens * 2) / 1e6
    shadow_cost = (10 * 10 + tokens * 20) / 1e6
    assert [charge.tier for charge in answer.finish.bill.charges] == ["small"]
    assert answer.finish.bill.cost == pytest.approx(cost)
    assert listed.bill.cost == pytest.approx(cost)
    assert listed.shadow_bill.cost == pytest.approx(shadow_cost)
    assert [(charge.tier, charge.completion_tokens) for charge in listed.shadow_bill.charges] == [
        ("large", tokens)
    ]
    assert count("headrace.shadow.cost", tier="large") == pytest.approx(spent + shadow_cost)
    assert count("headrace.cost") == pytest.approx(before["headrace.cost"] + cost)
    assert count("headrace.tenant.cost") == pytest.approx(before["headrace.tenant.cost"] + cost)
    assert count("headrace.billed_tokens") == before["headrace.billed_tokens"] + 10 + tokens
    assert count("headrace.routed") == before["headrace.routed"] + 1


async def test_a_shadow_answer_has_a_trace_of_its_own_that_links_to_the_callers(
    spans: InMemorySpanExporter,
) -> None:
    """Or else it would be a part of the caller's trace that begins after its end, or nobody's."""
    small, large = TextBatcher(text=BAD), TextBatcher(text=GOOD)
    async with routed({**SHADOW, "judge": "rules"}, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION))
        await eventually(lambda: any(span.name == "router.shadow" for span in spans.get_finished_spans()))

    finished = spans.get_finished_spans()
    (shadow,) = [span for span in finished if span.name == "router.shadow"]
    (link,) = shadow.links
    callers = [span for span in finished if span.context.trace_id == link.context.trace_id]
    (below,) = [span for span in finished if span.parent and span.parent.span_id == shadow.context.span_id]
    said = " ".join(str(value) for span in finished for value in (span.attributes or {}).values())
    of_shadow = shadow.attributes or {}
    assert shadow.parent is None
    assert {"router.score"} <= {span.name for span in callers}
    assert "router.shadow" not in {span.name for span in callers}
    assert (below.attributes or {})["headrace.tier"] == "large"
    assert of_shadow["headrace.request.id"] == answer.accepted.request_id
    assert of_shadow["headrace.verdict"] == "better"
    assert "capital" not in said, "neither prompts nor answers are in spans"


async def test_without_a_shadow_there_is_no_second_bill() -> None:
    async with routed(ALL_TO_SMALL, small=TextBatcher(), large=TextBatcher()) as client:
        await collect(client, chat(QUESTION))
        listed = await client.list_tiers()

    assert not listed.HasField("shadow_bill")


async def test_a_tier_that_hints_exclude_receives_no_shadow_request(count: Callable[..., float]) -> None:
    before = count("headrace.shadow.requests")
    large = FakeBatcher()
    async with routed(SHADOW, small=FakeBatcher(), large=large) as client:
        for hint in ("tier", "max_tier"):
            request = chat(QUESTION)
            setattr(request.routing, hint, "small")
            await collect(client, request)
        await collect(client, chat("marked"))
        await shadows(count, before)

    assert [request.chat.messages[0].content for request in large.requests] == ["marked"]


async def test_an_answer_of_the_other_tier_itself_is_not_repeated(count: Callable[..., float]) -> None:
    before = count("headrace.shadow.requests")
    small, large = FakeBatcher(), FakeBatcher()
    async with routed({**SHADOW, "shadow_tier": "small"}, small=small, large=large) as client:
        await collect(client, chat(QUESTION))
        request = chat("of large")
        request.routing.min_tier = "large"
        await collect(client, request)
        request = chat("of large, repeated")
        request.routing.quality_preference = 1.0
        await collect(client, request)
        await shadows(count, before)

    assert [request.chat.messages[0].content for request in small.requests] == [
        QUESTION,
        "of large, repeated",
    ]


async def test_a_failed_request_is_not_answered_again(count: Callable[..., float]) -> None:
    before = count("headrace.shadow.requests")
    large = FakeBatcher()
    async with routed(SHADOW, small=FakeBatcher(breaks=[2, 2, 2, 2, 2, 2]), large=large) as client:
        request = chat("fails")
        request.routing.allow_escalation = False
        with pytest.raises(errors.BatcherLost):
            await collect(client, request)

    assert large.requests == []
    assert count("headrace.shadow.requests") == before


@pytest.mark.parametrize(
    ("large", "bound"), [(FakeBatcher(queued=1), "queue"), (FakeBatcher(healthy=False), "tier")]
)
async def test_a_tier_with_a_queue_or_without_health_gets_no_shadow_request(
    large: FakeBatcher, bound: str, count: Callable[..., float]
) -> None:
    before = count("headrace.shadow.skipped", bound=bound)
    async with routed(SHADOW, small=FakeBatcher(), large=large) as client:
        await collect(client, chat(QUESTION))
        await eventually(lambda: count("headrace.shadow.skipped", bound=bound) == before + 1)

    assert large.requests == []


async def test_requests_beyond_a_bound_are_skipped(count: Callable[..., float]) -> None:
    ended, rate = count("headrace.shadow.requests"), count("headrace.shadow.skipped", bound="rate")
    async with routed(
        {**SHADOW, "shadow_per_minute": 1, "shadow_concurrency": 10}, small=FakeBatcher(), large=FakeBatcher()
    ) as client:
        for _ in range(3):
            await collect(client, chat(QUESTION))
        await shadows(count, ended)

        assert count("headrace.shadow.skipped", bound="rate") == rate + 2

    cost = count("headrace.shadow.skipped", bound="cost")
    bounded = {**SHADOW, "shadow_cost_per_day": 0.0003}  # one costs 0.00022
    async with routed(bounded, small=TextBatcher(), large=TextBatcher()) as client:
        for place in range(3):
            await collect(client, chat(QUESTION))
            await eventually(
                lambda made=place: (
                    count("headrace.shadow.requests") == ended + 2  # type: ignore[misc]
                    and count("headrace.shadow.skipped", bound="cost") == cost + made
                )
            )
        spent = (await client.list_tiers()).shadow_bill.cost

    assert 0 < spent <= 0.0003


@dataclass
class EndlessBatcher(FakeBatcher):
    """Accepts requests whose text begins with "endless", and sends nothing more."""

    left: int = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id=request.request_id, model=self.model))
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1


async def test_shadow_requests_in_flight_are_bounded_and_cancelled_at_the_drain(
    count: Callable[..., float],
) -> None:
    before = count("headrace.shadow.skipped", bound="concurrency")
    ended = count("headrace.shadow.requests", outcome="cancelled")
    large = EndlessBatcher()
    settings = {**SHADOW, "drain_seconds": PATIENCE * 10, "shadow_concurrency": 2}
    began = time.monotonic()
    async with routed(settings, small=FakeBatcher(), large=large) as client:
        for place in range(4):
            await collect(client, chat(f"endless {place}"))
        await eventually(lambda: len(large.requests) == 2)

        assert count("headrace.shadow.skipped", bound="concurrency") == before + 2

    assert time.monotonic() - began < PATIENCE * 10, "the drain does not wait for them"
    assert count("headrace.shadow.requests", outcome="cancelled") == ended + 2
    await eventually(lambda: large.left == 2)


async def test_a_share_of_requests_is_drawn(count: Callable[..., float]) -> None:
    before = count("headrace.shadow.requests") + count("headrace.shadow.skipped")
    settings = {**SHADOW, "shadow_share": 0.3, "shadow_per_minute": 10_000, "shadow_concurrency": 1000}
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
        for _ in range(10):
            await asyncio.gather(*(collect(client, chat("x")) for _ in range(20)))
        await eventually(lambda: count("headrace.shadow.requests") - before >= 30)
        drawn = count("headrace.shadow.requests") + count("headrace.shadow.skipped") - before

    assert 30 <= drawn <= 95, "60 of 200, with five standard deviations"


async def test_only_requests_that_the_other_choice_sends_elsewhere_are_answered_again(
    count: Callable[..., float], tmp_path: Path
) -> None:
    """Here the other choice is another set of thresholds for the scorer in use."""
    calibration = calibrated(tmp_path, 0.3)
    before = count("headrace.shadow.requests")
    settings = {"thresholds": "0.999", "shadow_calibration": calibration, "shadow_share": 1.0}
    small, large = FakeBatcher(), FakeBatcher()
    async with routed(settings, small=small, large=large) as client:
        await collect(client, chat("Hello!"))
        await collect(client, chat("Prove step by step that there are infinitely many primes."))
        await shadows(count, before)

    assert len(small.requests) == 2
    assert [request.chat.messages[0].content for request in large.requests] == [
        "Prove step by step that there are infinitely many primes."
    ]


def calibrated(folder: Path, threshold: float) -> Path:
    path = folder / "calibration.json"
    save(Calibration(("small", "large"), (0.0, threshold), (0.7, 0.3), fingerprint(load()), 1, ()), path)
    return path


# The judge.


async def judged(
    tmp_path: Path,
    count: Callable[..., float],
    judge: str,
    small: FakeBatcher,
    large: FakeBatcher,
    *,
    prompt: str = QUESTION,
    third: FakeBatcher | None = None,
) -> list[dict[str, Any]]:
    path = tmp_path / "feedback.jsonl"
    before = count("headrace.shadow.verdicts")
    unjudged = count("headrace.shadow.verdicts", verdict="unjudged")
    settings = {**SHADOW, "prices": "", "judge": judge, "feedback": path}
    tiers = {} if third is None else {"third": third}
    if tiers:
        settings["thresholds"] = "0.999,0.9999"
    async with routed(settings, small=small, large=large, **tiers) as client:
        await collect(client, chat(prompt))
        await eventually(lambda: count("headrace.shadow.verdicts") == before + 1)
        if count("headrace.shadow.verdicts", verdict="unjudged") == unjudged:
            await eventually(lambda: bool(rows(path)))
    return rows(path)


async def test_rules_prefer_an_answer_to_a_refusal(tmp_path: Path, count: Callable[..., float]) -> None:
    better = count("headrace.shadow.verdicts", tier="large", verdict="better")
    (row,) = await judged(tmp_path, count, "rules", TextBatcher(text=BAD), TextBatcher(text=GOOD))

    assert (row["small_ok"], row["large_ok"]) == (0.0, 1.0)
    assert (row["source"], row["judge"], row["tier"], row["shadow"]) == ("judge", "rules", "small", "large")
    assert (row["verdict"], row["prompt"]) == ("better", QUESTION)
    assert count("headrace.shadow.verdicts", tier="large", verdict="better") == better + 1


async def test_exact_takes_the_larger_tiers_result_as_right(
    tmp_path: Path, count: Callable[..., float]
) -> None:
    asked = "How many are 17 + 25?"
    (tmp_path / "same").mkdir()
    small = TextBatcher(text="17 + 25 = 42.")
    (same,) = await judged(
        tmp_path / "same", count, "exact", small, TextBatcher(text="The answer is 42."), prompt=asked
    )
    (other,) = await judged(tmp_path, count, "exact", small, TextBatcher(text="It is 43."), prompt=asked)

    assert (same["verdict"], same["small_ok"]) == ("tie", 1.0)
    assert (other["verdict"], other["small_ok"]) == ("better", 0.0)
    assert "large_ok" not in same
    assert "large_ok" not in other


@dataclass
class JudgeBatcher(FakeBatcher):
    """Prefers the answer that contains *likes*; without it, always the one at the first position."""

    likes: str = ""
    says: str = ""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        text = request.chat.messages[-1].content
        a, b = text.split("=== answer A")[1].split("=== answer B")[:2]
        word = "A" if not self.likes or self.likes in a else "B"
        assert self.likes in a + b
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id=request.request_id, model=self.model))
        yield pb.GenerateResponse(delta=pb.Delta(token_count=1, token_ids=[1], text=self.says or word))
        yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP))


async def test_a_judge_model_is_asked_twice_with_the_answers_swapped(
    tmp_path: Path, count: Callable[..., float]
) -> None:
    judge = JudgeBatcher(likes=GOOD)
    (row,) = await judged(
        tmp_path, count, "third", TextBatcher(text=BAD), TextBatcher(text=GOOD), third=judge
    )

    assert (row["judge"], row["verdict"], row["small_ok"], row["large_ok"]) == ("third", "better", 0.0, 1.0)
    first, second = (request.chat.messages[-1].content for request in judge.requests)
    assert first.index(BAD) < first.index(GOOD)
    assert second.index(GOOD) < second.index(BAD)
    assert all(request.sampling.temperature == 0 for request in judge.requests)
    assert all(request.routing.priority == 0 for request in judge.requests)


async def test_a_judge_model_that_prefers_a_position_finds_a_tie(
    tmp_path: Path, count: Callable[..., float]
) -> None:
    (row,) = await judged(tmp_path, count, "third", TextBatcher(), TextBatcher(), third=JudgeBatcher())

    assert (row["verdict"], row["small_ok"], row["large_ok"]) == ("tie", 0.5, 0.5)


@pytest.mark.parametrize(
    "judge",
    [JudgeBatcher(says="Both are fine, but A."), FakeBatcher(refuses="broken"), FakeBatcher(healthy=False)],
)
async def test_what_a_judge_model_does_not_decide_is_not_written(
    tmp_path: Path, count: Callable[..., float], judge: FakeBatcher
) -> None:
    before = count("headrace.shadow.verdicts", verdict="unjudged")
    found = await judged(tmp_path, count, "third", TextBatcher(), TextBatcher(), third=judge)

    assert found == []
    assert count("headrace.shadow.verdicts", verdict="unjudged") == before + 1


async def test_verdicts_fill_a_quarter_of_the_file_at_most(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    feedback = Feedback(path, max_bytes=20_000)
    kept = [
        await feedback.keep_judged(
            AnswerRecord("a", "q", "small", 0.5, [Turn("user", "x" * 300)]), {"small_ok": 1.0}
        )
        for _ in range(50)
    ]

    assert 5 < sum(kept) < 20
    assert path.stat().st_size <= 20_000 / 4 + 500


# The settings.


@pytest.mark.parametrize(
    ("given_settings", "problem"),
    [
        ({"judge": "rules"}, "HEADRACE_JUDGE needs"),
        (
            {"shadow_share": 0.1, "shadow_per_minute": 1},
            "HEADRACE_SHADOW_SHARE and HEADRACE_SHADOW_PER_MINUTE need HEADRACE_SHADOW_TIER",
        ),
        ({"shadow_tier": "huge"}, "must be one of the tiers small, large"),
        ({"shadow_tier": "large", "judge": "huge"}, "must be rules, exact, or one of the tiers"),
        ({"shadow_tier": "large", "shadow_scorer": "s.json"}, "set one choice"),
        ({"shadow_tier": "large", "shadow_cost_per_day": 1}, "add large to HEADRACE_PRICES"),
        ({"shadow_tier": "large", "shadow_share": 2}, "less than or equal to 1"),
    ],
)
def test_settings_that_cannot_be_used_are_rejected(given_settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Settings(port=0, tiers="small=127.0.0.1:1,large=127.0.0.1:2", **given_settings)


async def test_a_router_does_not_start_with_an_unusable_candidate(tmp_path: Path) -> None:
    path = tmp_path / "scorer.json"
    path.write_text("{}")
    settings = Settings(port=0, tiers="small=127.0.0.1:1,large=127.0.0.1:2", shadow_scorer=path)
    with pytest.raises(StartFailed, match="is not a scorer"):
        async with router(settings):
            pass


# The bounds.


@given(
    steps=st.lists(st.tuples(st.sampled_from(["begin", "end"]), st.floats(0, 50), st.floats(0, 3))),
    per_minute=st.floats(0.1, 20),
    concurrency=st.integers(1, 4),
    most=st.floats(0.5, 10),
)
def test_no_bound_is_exceeded(
    steps: list[tuple[str, float, float]], per_minute: float, concurrency: int, most: float
) -> None:
    bounds = Bounds(per_minute=per_minute, concurrency=concurrency, cost_per_day=most)
    now, running, began, spent = 0.0, list[float](), 0, 0.0
    for step, pause, cost in steps:
        now += pause
        if step == "end" and running:
            estimate = running.pop()
            bounds.end(estimate, estimate, now)
            spent += estimate
        elif step == "begin" and bounds.reached(cost, now, now) is None:
            bounds.begin(cost, now)
            running.append(cost)
            began += 1

        assert len(running) <= concurrency
        assert spent + sum(running) <= most + 1e-6
        assert began <= max(per_minute, 1) + now * per_minute / 60 + 1e-6


def test_a_new_day_has_a_new_budget() -> None:
    bounds = Bounds(per_minute=100, concurrency=9, cost_per_day=1.0)
    bounds.begin(0.5, 0.0)
    bounds.end(0.5, 2.0, 0.0)

    assert bounds.reached(0.1, 1.0, 1.0) == "cost"
    assert bounds.reached(0.1, 1.0, DAY_SECONDS + 1.0) is None


# Another scorer as the other choice.


@dataclass
class LengthScorer:
    """Scores a text by its length."""

    def score(self, text: str) -> Score:
        return Score(min(len(text) / 100, 1.0), 0.0)

    def score_turns(self, turns: Sequence[Turn], earlier: Earlier | None = None) -> Score:
        return self.score(turns[-1].text)


def ended(text: str, tier: str, score: float) -> Answered:
    """A request for *text* that *tier* has answered."""
    tiers = [TierView("small", 0.0), TierView("large", 0.5)]
    return Answered(
        request=pb.GenerateRequest(prompt=text),
        turns=[Turn("user", text)],
        score=Score(score, 0.0),
        facts=RoutingRequest(score, Hints()),
        decision=decide(score, Hints(), tiers),
        tier=tier,
        finish="stop",
        outcome="ok",
        text="",
        bill=Bill(["small", "large"], {}),
        seconds=1.0,
    )


def candidate(shares: Sequence[float] = ()) -> Candidate:
    thresholds = Thresholds([0.0, 0.5], shares=shares)
    return Candidate(LengthScorer(), thresholds, adapted=bool(shares))


@pytest.mark.parametrize("score", [0.1, 0.9])
def test_a_candidate_chooses_by_its_own_score(score: float) -> None:
    choice = candidate()

    assert choice.tier(ended("x" * 80, "small", score), drawn=True) == "large"
    assert choice.tier(ended("x" * 20, "small", score), drawn=True) == "small"


def test_a_candidate_keeps_the_share_for_its_own_scores_over_all_requests() -> None:
    """Its scores have another distribution, so the thresholds of the scorer in use would not keep it."""
    choice, draw = candidate([0.3]), random.Random(7)
    chosen = []
    for place in range(400):
        answered = ended("x" * draw.randrange(1, 40), "small", 0.1)
        tier = choice.tier(answered, drawn=place % 4 == 0)
        chosen.append(tier)

    assert set(chosen) == {"small", "large"}
    assert abs(chosen[200:].count("large") / 200 - 0.3) <= 0.05


def test_a_candidate_that_estimates_success_chooses_by_it() -> None:
    """The router's prices and weight of cost apply to the candidate's estimates, too."""
    weighing = Weighing(["small", "large"], {"small": Price(1, 1), "large": Price(10, 10)}, cost_weight=0.1)
    thresholds = Thresholds([0.0, 0.5])
    for gain, wanted in ((0.0, "small"), (0.4, "large")):
        scorer = EstimatingScorer(gain)
        choice = Candidate(scorer, thresholds, adapted=False, weighing=weighing)

        assert choice.tier(ended("x", "small", 0.1), drawn=True) == wanted
        assert Candidate(scorer, thresholds, adapted=False).tier(ended("x", "small", 0.1), drawn=True) == (
            "small"
        ), "by its score"


@dataclass
class EstimatingScorer(LengthScorer):
    """Expects the large tier to answer better by *gain*."""

    gain: float = 0.0

    def score(self, text: str) -> Score:
        estimates = {"small": Estimate(0.5, 20.0), "large": Estimate(0.5 + self.gain, 20.0)}
        return Score(0.1, 0.0, estimates=estimates)
