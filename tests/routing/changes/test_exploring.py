"""Chance sends a known share of requests to other tiers, and never where the policy could not."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.routing.changes.exploring import explorable, explore, may_explore
from headrace.routing.no_route import NoRoute
from headrace.routing.policy import Decision, cheapest_from, decide, trouble
from headrace.routing.request import Hints, RoutingRequest
from headrace.routing.share import ShareKeeper
from headrace.routing.tier_view import Price, TierView
from tests.routing.test_policy import hints_for, seconds, tier_lists

SMALL, LARGE = TierView("small", 0.0), TierView("large", 0.5)
STEPS = 400  # of a grid of draws


@given(data=st.data(), tiers=tier_lists(), score=st.floats(0, 1), left=seconds, share=st.floats(0.01, 1))
def test_the_chances_are_what_equally_spaced_draws_choose(
    data: st.DataObject, tiers: list[TierView], score: float, left: float, share: float
) -> None:
    names = [tier.name for tier in tiers]
    floor = data.draw(st.sampled_from(["", *names]))
    try:
        decision = decide(score, data.draw(hints_for(names)), tiers, floor=floor, seconds_left=left)
    except NoRoute:
        assume(False)
    drawn = [explore(decision, share, step / STEPS) for step in range(STEPS)]
    counted = Counter(one.place for one in drawn)

    chances = dict(drawn[0].chances) or {decision.place: 1.0}
    assert sum(chances.values()) == pytest.approx(1)
    assert set(chances) == set(explorable(decision.considered))
    for place, chance in chances.items():
        assert counted[place] / STEPS == pytest.approx(chance, abs=4 / STEPS)
    assert all(one.propensity == pytest.approx(chances[one.place]) for one in drawn)
    assert all(one.tier == names[one.place] for one in drawn)


@given(data=st.data(), tiers=tier_lists(), score=st.floats(0, 1), left=seconds, draw=st.floats(0, 0.999))
def test_chance_keeps_every_rule_of_the_policy(
    data: st.DataObject, tiers: list[TierView], score: float, left: float, draw: float
) -> None:
    names = [tier.name for tier in tiers]
    failed = data.draw(st.sets(st.sampled_from(names), max_size=2))
    floor = data.draw(st.sampled_from(["", *names]))
    try:
        decision = decide(
            score, data.draw(hints_for(names)), tiers, floor=floor, seconds_left=left, exclude=failed
        )
    except NoRoute:
        assume(False)
    moved = explore(decision, 1.0, draw)

    if not moved.explored:
        assert (moved.tier, moved.escalations) == (decision.tier, decision.escalations)
        return
    tier = tiers[moved.place]
    assert moved.place in decision.considered.choices, "the hints allow it"
    assert tier.healthy
    assert tier.name not in failed
    assert not any(trouble(tier, left)), "it is in time and has no full queue"
    if floor:
        assert moved.place >= min(names.index(floor), decision.place)
    usable = explorable(decision.considered)
    assert cheapest_from(moved.place, usable, tiers) == moved.place, "no larger tier is cheaper"
    assert all(names.index(name) > moved.place for name in moved.escalations)
    assert moved.cause == "explored"
    assert repr(tier.name) in moved.why


def test_without_a_share_nothing_is_explored() -> None:
    decision = decide(0.2, Hints(), [SMALL, LARGE])

    assert explore(decision, 0.0, 0.0) is decision


def test_a_late_or_full_tier_is_not_replaced_by_chance() -> None:
    """The policy has then chosen the least bad one."""
    late = [replace(SMALL, answer_seconds=9.0), replace(LARGE, answer_seconds=20.0)]
    full = [replace(SMALL, saturated=True), replace(LARGE, saturated=True)]
    for decision in (decide(0.2, Hints(), late, seconds_left=5.0), decide(0.2, Hints(), full)):
        assert explorable(decision.considered) == [decision.place]


def test_nobody_pays_more_for_a_smaller_model_by_chance() -> None:
    dear = [replace(SMALL, price=Price(3, 3)), replace(LARGE, price=Price(1, 1))]

    assert explorable(decide(0.9, Hints(), dear).considered) == [1]


@pytest.mark.parametrize(
    "request_",
    [
        RoutingRequest(0.5, Hints(tier="small")),
        RoutingRequest(0.5, Hints(model="echo")),
        RoutingRequest(0.5, Hints(quality_preference=0)),
        RoutingRequest(0.5, Hints(quality_preference=1)),
        RoutingRequest(0.5, Hints(allow_escalation=False)),
        RoutingRequest(0.5, Hints(), resumes=True),
        RoutingRequest(0.5, Hints(), scored=False),
    ],
)
def test_requests_that_leave_no_choice_are_not_explored(request_: RoutingRequest) -> None:
    assert not may_explore(request_)
    assert may_explore(RoutingRequest(0.5, Hints(min_tier="small", quality_preference=0.7)))


def sent(keeper: ShareKeeper, scores: list[float], share: float, draws: random.Random) -> list[int]:
    """Return the place of each request, with thresholds that keep shares and with exploration."""
    places = []
    for score in scores:
        tiers = [TierView(str(place), mark) for place, mark in enumerate(keeper.thresholds())]
        decision: Decision = explore(decide(score, Hints(), tiers), share, draws.random())
        keeper.record(score, decision.place if decision.explored else decision.wanted)
        places.append(decision.place)
    return places


@pytest.mark.parametrize("shares", [[0.3], [0.1], [0.3, 0.1]])
def test_shares_are_kept_with_exploration(shares: list[float]) -> None:
    """Calls by chance count, and later ones correct them: 200 calls are within five points."""
    for seed in range(10):
        draws = random.Random(seed)
        scores = [draws.random() ** (1 + seed % 3) for _ in range(800)]
        places = sent(ShareKeeper(shares), scores, 0.05, draws)

        for place, share in enumerate([1 - sum(shares), *shares]):
            for start in range(0, 600, 20):
                stretch = places[start : start + 200]
                assert abs(stretch.count(place) / 200 - share) <= 0.05
