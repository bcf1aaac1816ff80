"""A router whose scorer knows the tiers' outcomes sends each prompt to the tier that is best at it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.client import chat
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.routing.scoring import prompt_features, scorer
from headrace.routing.success.heads import Heads
from headrace.runtime.serving.server import StartFailed
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect, eventually
from tests.router.drafts import BAD, TextBatcher
from tests.router.fake_batchers import FakeBatcher, routed

CODE = "Write a Python function that merges two sorted lists and returns the result."
FACT = "Who wrote Hamlet?"
MATHS = "Solve $x^2 - 5x = 14$ for all real $x$."
PRICES = "code=1/1,maths=1/1,talk=1/1"
# Log-odds of a good answer by kind of prompt.
SKILLS = {
    "code": {"code": 3.0, "mathematics": -1.0},
    "maths": {"code": -1.0, "mathematics": 3.0, "fact": 1.0},
    "talk": {"code": -2.0, "mathematics": -2.0, "fact": 3.0, "open": 3.0},
}


@pytest.fixture
def skilled(tmp_path: Path) -> Path:
    """Return a scorer file with the tiers' skills."""
    model = scorer.load().model
    features = np.zeros((len(SKILLS), len(prompt_features.NAMES)))
    kinds = np.array([[skills.get(kind, 0.0) for kind in model.kinds] for skills in SKILLS.values()])
    heads = Heads(
        tiers=tuple(SKILLS),
        weights=np.hstack([features, kinds]),
        bias=np.zeros(len(SKILLS)),
        tokens=np.full(kinds.shape, math.nan),
        rows=(100,) * len(SKILLS),
    )
    path = tmp_path / "scorer.json"
    scorer.save(replace(model, tiers=heads), path)
    return path


def tiers(**changed: FakeBatcher) -> dict[str, Any]:
    return {name: changed.get(name, FakeBatcher()) for name in SKILLS}


def routing(path: Path, **settings: Any) -> dict[str, Any]:
    return {"scorer": path, "prices": PRICES, **settings}


async def test_each_prompt_goes_to_the_tier_that_is_best_at_it(skilled: Path) -> None:
    """Although the tiers are in no order of quality."""
    async with routed(routing(skilled), **tiers()) as client:
        answered = [(await client.explain(chat(text))).tier for text in (CODE, MATHS, FACT)]
        explained = await client.explain(chat(CODE))

    assert answered == ["code", "maths", "talk"]
    assert explained.why.startswith("tier 'code' is best, with P(good) 0.9")
    assert all("P(good)" in candidate.reason for candidate in explained.candidates)


async def test_a_tier_that_is_lost_is_replaced_by_the_next_best(skilled: Path) -> None:
    async with routed(routing(skilled), **tiers(talk=FakeBatcher(refuses="broken"))) as client:
        answer = await collect(client, chat(FACT))

    assert answer.accepted.tier == "maths"


async def test_bounds_hold_in_the_configured_order(skilled: Path) -> None:
    request = chat(FACT)
    request.routing.max_tier = "code"
    async with routed(routing(skilled), **tiers()) as client:
        assert (await client.explain(request)).tier == "code"


async def test_quality_preference_ranges_from_the_cheapest_tier_to_the_best(skilled: Path) -> None:
    prices = "code=1/1,maths=9/9,talk=900/900"
    request = chat(FACT)
    async with routed(routing(skilled, prices=prices), **tiers()) as client:
        found = []
        for preference in (0.0, 0.1, 1.0):
            request.routing.quality_preference = preference
            found.append((await client.explain(request)).tier)

    assert found == ["code", "maths", "talk"]


async def test_a_rejected_draft_is_replaced_by_a_tier_that_is_more_likely_to_answer_well(
    skilled: Path,
) -> None:
    """Also by one that is listed before it."""
    request = chat(CODE)
    request.routing.min_tier = "code"
    prices = "code=90/90,maths=1/1,talk=1/1"
    batchers = {name: TextBatcher() for name in SKILLS}
    batchers["maths"].text = BAD
    settings = routing(skilled, prices=prices, cascade=True, cost_weight=5.0)
    async with routed(settings, **batchers) as client:
        answer = await collect(client, request)

    assert [len(batcher.requests) for batcher in batchers.values()] == [1, 1, 0]
    assert answer.accepted.tier == "code"


async def test_a_conversation_does_not_move_to_a_tier_that_is_less_likely_to_answer_well(
    skilled: Path,
) -> None:
    first, second = chat(FACT), chat(FACT)
    for request in (first, second):
        request.routing.session_id = "a"
    first.routing.tier = "maths"
    second.routing.quality_preference = 0.0
    async with routed(routing(skilled, prices="code=1/1,maths=9/9,talk=900/900"), **tiers()) as client:
        await collect(client, first)
        explained = await client.explain(second)

    assert explained.tier == "maths"


@pytest.mark.parametrize(
    "settings", [{"share": "0.3,0.3"}, {"thresholds": "0.4,0.6"}, {"choose_by": "score"}]
)
async def test_thresholds_take_precedence_unless_success_is_demanded(
    settings: dict[str, Any], skilled: Path
) -> None:
    async with routed(routing(skilled, **settings), **tiers()) as client:
        assert "is in the range of tier" in (await client.explain(chat(CODE))).why


async def test_without_outcomes_of_all_tiers_the_score_decides_as_before(skilled: Path) -> None:
    others: dict[str, Any] = {"small": FakeBatcher(), "large": FakeBatcher()}
    found: list[list[tuple[str, str]]] = []
    for settings in ({}, {"scorer": skilled}, {"choose_by": "score"}):
        async with routed(settings, **others) as client:
            answers = [await client.explain(chat(text)) for text in (CODE, MATHS, FACT, "Hello!")]
            found.append([(answer.tier, answer.why) for answer in answers])

    assert found[0] == found[1] == found[2]
    assert {tier for tier, _ in found[0]} == {"small", "large"}


async def test_a_budget_that_is_spent_leaves_the_cheapest_tier(skilled: Path) -> None:
    """The first answer is longer than a day's budget; the next request is decided after its end."""
    prices = "code=1/1,maths=1/1,talk=1000000/1000000"
    batchers = {name: TextBatcher() for name in SKILLS}
    async with routed(routing(skilled, prices=prices, budget_per_day=1.0), **batchers) as client:
        request = chat(FACT)
        request.routing.tier = "talk"
        await collect(client, request)
        explained = await client.explain(chat(FACT))

    assert explained.tier == "maths"
    assert "expected cost" in explained.why


async def test_requests_in_flight_count_towards_the_budget_until_they_end(skilled: Path) -> None:
    """Otherwise a burst of them could spend many times the budget before the first one ends."""
    prices = "code=1/1,maths=1/1,talk=1000000/1000000"
    talk = FakeBatcher(hangs=True)
    async with routed(routing(skilled, prices=prices, budget_per_day=100.0), **tiers(talk=talk)) as client:
        asked = asyncio.create_task(collect(client, chat(FACT)))
        await eventually(lambda: len(talk.requests) == 1)
        during = (await client.explain(chat(FACT))).tier
        asked.cancel()
        while (await client.explain(chat(FACT))).tier != "talk":
            await asyncio.sleep(0.01)

    assert during == "maths"


@pytest.mark.parametrize(
    "settings", [{"choose_by": "success"}, {"budget_per_day": 1.0, "prices": "a=1/2,b=2/4"}]
)
async def test_a_choice_by_success_needs_outcomes(settings: dict[str, Any]) -> None:
    with pytest.raises(StartFailed, match="headrace train ROWS"):
        async with router(Settings(port=0, tiers="a=127.0.0.1:1,b=127.0.0.1:2", **settings)):
            pass


@pytest.mark.parametrize("settings", [{"choose_by": "success"}, {"budget_per_day": 1.0}])
async def test_a_scorer_that_loses_its_outcomes_does_not_end_a_choice_by_success(
    settings: dict[str, Any], skilled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No budget would be kept."""
    async with routed(routing(skilled, poll_seconds=0.02, **settings), **tiers()) as client:
        scorer.save(replace(scorer.load().model, centre=0.7), skilled)
        await eventually(lambda: "scorer not usable, keeping the old one" in caplog.text)
        explained = await client.explain(chat(MATHS))

    assert explained.tier == "maths"
    assert "expected cost" in explained.why or "P(good)" in explained.why


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"choose_by": "success", "share": "0.5"}, "uses no thresholds"),
        ({"choose_by": "success", "thresholds": "0.5"}, "uses no thresholds"),
        ({"budget_per_day": 1.0}, "needs the price of each tier"),
        ({"budget_per_day": 1.0, "prices": "a=1/1"}, "needs the price of each tier"),
        ({"budget_per_day": 1.0, "prices": "a=1/1,b=2/2", "share": "0.5"}, "a choice by success"),
        ({"cost_weight": 0.2, "choose_by": "score"}, "HEADRACE_COST_WEIGHT .* needs a choice by success"),
        ({"cost_weight": 0.2, "share": "0.5"}, "HEADRACE_COST_WEIGHT .* needs a choice by success"),
        ({"choose_by": "luck"}, "score"),
        ({"cost_weight": -1.0}, "greater than or equal to 0"),
        ({"cost_weight": math.inf}, "finite"),
        ({"budget_per_day": math.inf, "prices": "a=1/1,b=2/2"}, "finite"),
        ({"budget_per_day": 1.0, "prices": "a=1/1,b=2/2", "cost_weight": 0.0}, "--cost-weight above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_rejected(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Settings(tiers="a=127.0.0.1:1,b=127.0.0.1:2", **settings)


async def test_usage_of_answers_changes_what_is_expected(skilled: Path) -> None:
    """A tier whose answers are long becomes too expensive for what it is better by."""
    prices = "code=2/2,maths=2/2,talk=2/2"
    long = TextBatcher(text="word " * 400)
    async with routed(routing(skilled, prices=prices, cost_weight=0.7), **tiers(talk=long)) as client:
        before = (await client.explain(chat(FACT))).tier
        request: pb.GenerateRequest = chat(FACT)
        request.routing.tier = "talk"
        for _ in range(20):
            await collect(client, request)
        explained = await client.explain(chat(FACT))

    assert (before, explained.tier) == ("talk", "maths")


async def test_turns_on_a_new_topic_are_expected_to_be_cached_like_those_before(skilled: Path) -> None:
    """Their prompt has the same beginning: the conversation so far."""
    maths = TextBatcher(cached=10)  # of the 10 tokens of its prompts
    prices = "code=2/0/0,maths=2/0/0,talk=2/0/0"
    settings = routing(skilled, prices=prices, cost_weight=0.7)
    async with routed(settings, **tiers(maths=maths)) as client:
        request: pb.GenerateRequest = chat(MATHS)
        request.routing.session_id = "a"
        for _ in range(20):
            await collect(client, request)
        follows, begins = (await client.explain(request)), (await client.explain(chat(MATHS)))

    costs = [float(found.why.split("cost ")[1].split(" ")[0]) for found in (follows, begins)]
    assert costs[0] < costs[1]
