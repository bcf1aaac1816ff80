"""By estimates, the tier with the best quality for its cost is chosen, in whatever order the tiers are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.routing.changes.exploring import explore
from headrace.routing.no_route import ConflictingHints, NoTierAvailable
from headrace.routing.policy import Decision, decide
from headrace.routing.request import Hints
from headrace.routing.success.choosing import Weighed, cost_weight
from headrace.routing.tier_view import TierView, even_thresholds

NAMES = ("code", "maths", "talk", "large")
chances = st.floats(0.01, 0.99)
costs = st.floats(0, 10)


@st.composite
def weighed_tiers(draw: st.DrawFn) -> tuple[list[TierView], Weighed]:
    """Draw tiers in any state, and what is expected of each."""
    count = draw(st.integers(1, 4))
    tiers = [
        TierView(
            name,
            threshold,
            draw(st.booleans()),
            saturated=draw(st.booleans()),
            answer_seconds=draw(st.floats(0, 20)),
        )
        for name, threshold in zip(NAMES, even_thresholds(count), strict=False)
    ]
    several = st.lists(chances, min_size=count, max_size=count)
    weight = draw(st.sampled_from([0.0, math.inf]) | st.floats(0, 5))
    cost = draw(st.lists(costs, min_size=count, max_size=count))
    return tiers, Weighed(tuple(draw(several)), tuple(cost), weight)


def value(weighed: Weighed, place: int) -> float:
    if math.isinf(weighed.weight):
        return -weighed.cost[place]
    return weighed.good[place] - weighed.weight * weighed.cost[place]


def place_of(tiers: list[TierView], name: str) -> int:
    return [tier.name for tier in tiers].index(name)


@given(drawn=weighed_tiers(), data=st.data(), left=st.just(math.inf) | st.floats(0, 20))
def test_the_best_tier_that_can_serve_is_chosen(
    drawn: tuple[list[TierView], Weighed], data: st.DataObject, left: float
) -> None:
    tiers, weighed = drawn
    names = [tier.name for tier in tiers]
    bound = st.sampled_from(["", *names])
    hints = Hints(min_tier=data.draw(bound), max_tier=data.draw(bound))
    floor = data.draw(bound)
    failed = data.draw(st.lists(st.sampled_from(names), max_size=2))
    try:
        decision = decide(0.5, hints, tiers, floor=floor, seconds_left=left, exclude=failed, weighed=weighed)
    except (ConflictingHints, NoTierAvailable):
        return

    low = place_of(tiers, hints.min_tier) if hints.min_tier else 0
    high = place_of(tiers, hints.max_tier) if hints.max_tier else len(tiers) - 1
    serving = [at for at in range(low, high + 1) if tiers[at].healthy and names[at] not in failed]
    in_time = [at for at in serving if tiers[at].answer_seconds <= left] or serving
    free = [at for at in in_time if not tiers[at].saturated] or in_time
    if floor:
        free = [at for at in free if weighed.good[at] >= weighed.good[place_of(tiers, floor)]] or free
    assert decision.place in free
    assert value(weighed, decision.place) == max(value(weighed, at) for at in free)
    better = {names[at] for at in serving if weighed.good[at] > weighed.good[decision.place]}
    assert set(decision.escalations) == better


LARGE_ONES_DOWN = [TierView(name, 0.25 * at, at < 2) for at, name in enumerate(NAMES)]


@given(drawn=weighed_tiers(), draw=st.floats(0, 0.999), floored=st.booleans())
@example(drawn=(LARGE_ONES_DOWN, Weighed((0.125, 0.25, 0.5, 0.5), (0.0,) * 4, 0.0)), draw=0.0, floored=True)
def test_chance_keeps_to_tiers_that_are_good_enough_for_the_conversation(
    drawn: tuple[list[TierView], Weighed], draw: float, floored: bool
) -> None:
    tiers, weighed = drawn
    floor = tiers[-1].name if floored else ""
    try:
        before = decide(0.5, Hints(), tiers, floor=floor, weighed=weighed)
    except NoTierAvailable:
        return

    after = explore(before, 0.5, draw)

    least = weighed.good[-1] if floored else 0.0
    assert weighed.good[after.place] >= min(least, weighed.good[before.place])
    assert sum(chance for _, chance in after.chances) == pytest.approx(1.0 if after.chances else 0.0)
    better = {
        tier.name for tier, good in zip(tiers, weighed.good, strict=True) if good > weighed.good[after.place]
    }
    assert set(after.escalations) <= better


@given(drawn=weighed_tiers(), low=st.floats(0, 1), high=st.floats(0, 1))
@example(drawn=(LARGE_ONES_DOWN, Weighed((0.25, 0.5, 0.5, 0.5), (1.0,) * 4, 0.0)), low=0.0, high=1e-308)
def test_a_higher_quality_preference_never_lowers_quality_or_cost(
    drawn: tuple[list[TierView], Weighed], low: float, high: float
) -> None:
    tiers, weighed = drawn
    tiers = [TierView(tier.name, tier.threshold) for tier in tiers]
    low, high = sorted((low, high))

    cheap, good = (
        decide(0.5, Hints(), tiers, weighed=replace(weighed, weight=cost_weight(1.0, preference))).place
        for preference in (low, high)
    )

    assert weighed.good[cheap] <= weighed.good[good] + 1e-9
    assert weighed.cost[cheap] <= weighed.cost[good] + 1e-9


@pytest.mark.parametrize(("preference", "tier"), [(0.0, "talk"), (0.5, "maths"), (1.0, "large")])
def test_the_preference_ranges_from_cost_alone_to_quality_alone(preference: float, tier: str) -> None:
    assert choice(weight=cost_weight(0.1, preference)).tier == tier


def choice(
    weight: float = 0.1, hints: Hints | None = None, floor: str = "", exclude: tuple[str, ...] = ()
) -> Decision:
    tiers = [TierView(name, mark) for name, mark in zip(NAMES, even_thresholds(4), strict=True)]
    weighed = Weighed((0.3, 0.7, 0.5, 0.8), (1.0, 1.0, 0.5, 4.0), weight)
    return decide(0.1, hints or Hints(), tiers, floor=floor, exclude=exclude, weighed=weighed)


def test_the_next_best_replaces_a_tier_that_failed_the_request() -> None:
    assert choice().tier == "maths"
    assert choice(exclude=("maths",)).tier == "talk"
    assert choice(exclude=("maths", "talk")).tier == "large"


def test_escalation_leads_to_tiers_that_are_more_likely_to_answer_well() -> None:
    assert choice().escalations == ("large",)
    assert choice(hints=Hints(tier="code")).escalations == ()
    assert choice(hints=Hints(max_tier="talk"), exclude=("maths",)).escalations == ()


def test_a_conversation_does_not_return_to_a_tier_that_is_less_likely_to_answer_well() -> None:
    decision = choice(floor="large")

    assert (decision.tier, decision.cause) == ("large", "conversation")
    assert "its conversation has reached 'large'" in decision.why
    assert choice(floor="code").tier == "maths"


def test_the_reason_names_chance_and_cost() -> None:
    decision = choice()

    assert decision.cause == "success"
    assert decision.why == "tier 'maths' is best, with P(good) 0.70 - cost 0.10 = 0.60"
    assert [candidate.reason for candidate in decision.candidates] == [
        "P(good) 0.30 - cost 0.10 = 0.20",
        "chosen: P(good) 0.70 - cost 0.10 = 0.60",
        "P(good) 0.50 - cost 0.05 = 0.45",
        "P(good) 0.80 - cost 0.40 = 0.40",
    ]
    assert "the bounds moved it to 'code'" in choice(hints=Hints(max_tier="code")).why
