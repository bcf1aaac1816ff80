"""A row of the decision log has what is needed to decide its request again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.routing.changes.exploring import explore
from headrace.routing.changes.records import (
    SECONDS_LEFT,
    BadRecord,
    Logged,
    Rated,
    digest,
    join,
    of_decision,
    parse,
)
from headrace.routing.no_route import NoRoute
from headrace.routing.policy import decide
from headrace.routing.request import Hints, RoutingRequest
from headrace.routing.scoring import scorer
from headrace.routing.scoring.conversation import Turn
from headrace.routing.scoring.score import Score
from headrace.routing.success.choosing import Weighed
from headrace.routing.success.estimate import Estimate
from headrace.routing.tier_view import TierView
from tests.routing.test_policy import hints_for, seconds, tier_lists

RESULT: dict[str, Any] = {
    "kind": "decision",
    "id": "1",
    "time": 100.0,
    "request": "q1",
    "tier": "small",
    "outcome": "ok",
    "tokens": {"prompt": 3, "cached": 0, "completion": 5, "wasted": 0},
    "cost": 0.5,
    "seconds": 1.5,
}


def logged(row: dict[str, Any]) -> Logged:
    """Return the request of a row, after it was written to a file."""
    record = parse(json.loads(json.dumps(row)))
    assert isinstance(record, Logged)
    return record


@given(data=st.data(), tiers=tier_lists(), score=st.floats(0, 1), left=seconds)
def test_the_row_of_a_decision_is_decided_the_same_way_again(
    data: st.DataObject, tiers: list[TierView], score: float, left: float
) -> None:
    names = [tier.name for tier in tiers]
    hints = data.draw(hints_for(names))
    floor = data.draw(st.sampled_from(["", *names]))
    score = round(score, 6)  # as it is in the row
    tiers = [_rounded(tier) for tier in tiers]
    weighed = data.draw(st.none() | weighed_for(len(tiers)))
    try:
        decision = decide(score, hints, tiers, floor=floor, seconds_left=left, weighed=weighed)
    except NoRoute:
        assume(False)
    chosen = explore(decision, 0.2, data.draw(st.floats(0, 0.999)))

    row = logged({**RESULT, **of_decision(RoutingRequest(score, hints), Score(score, 0.0), chosen)})

    again = decide(
        row.score, row.hints, row.tiers, floor=row.floor, seconds_left=SECONDS_LEFT, weighed=row.weighed
    )
    assert again.place == decision.place
    assert row.choice == chosen.tier
    assert row.chances[row.choice] == pytest.approx(chosen.propensity, abs=1e-6)
    assert sum(row.chances.values()) == pytest.approx(1, abs=1e-5)


def test_of_two_late_tiers_a_full_one_is_not_chosen_again_either() -> None:
    tiers = [
        TierView("small", 0.0, saturated=True, answer_seconds=5.0),
        TierView("large", 0.5, answer_seconds=5.0),
    ]
    decision = decide(0.1, Hints(), tiers, seconds_left=1.0)

    row = logged({**RESULT, **of_decision(RoutingRequest(0.1, Hints()), Score(0.1, 0.0), decision)})

    again = decide(row.score, row.hints, row.tiers, seconds_left=SECONDS_LEFT)
    assert (decision.tier, again.tier) == ("large", "large")


def weighed_for(tiers: int) -> st.SearchStrategy[Weighed]:
    """Draw expected qualities and costs as a row has them."""
    numbers = st.tuples(*[st.integers(0, 1000).map(lambda one: one / 1000)] * tiers)
    return st.builds(Weighed, numbers, numbers, st.sampled_from([0.0, 0.5, 2.0, math.inf]))


def _rounded(tier: TierView) -> TierView:
    return TierView(
        tier.name,
        round(tier.threshold, 6),
        tier.healthy,
        saturated=tier.saturated,
        answer_seconds=tier.answer_seconds,
        price=tier.price,
    )


def test_the_features_of_a_row_are_those_that_the_scorer_reads_from_text() -> None:
    score = scorer.load().score("How many primes are below 50?")
    row = logged({**RESULT, **of_decision(RoutingRequest(score.value, Hints()), score, None)})

    assert row.features == {one.name: pytest.approx(one.value, abs=1e-6) for one in score.features}
    assert row.reads == digest(score.names)
    assert row.reads == digest([*score.names, "turn:inherited", "kind:other"])
    assert row.reads != digest([*score.names, "another"])


def test_thresholds_that_no_score_reaches_and_estimates_survive_the_file() -> None:
    tiers = [TierView("small", 0.0), TierView("large", math.inf)]
    request = RoutingRequest(
        0.25, Hints(max_tier="large"), estimates={"small": Estimate(0.5, 12.0), "large": Estimate(0.75)}
    )
    row = logged({**RESULT, **of_decision(request, Score(0.25, 0.0), decide(0.25, Hints(), tiers))})

    assert [tier.threshold for tier in row.tiers] == [0.0, math.inf]
    assert row.hints == Hints(max_tier="large")
    assert row.estimates == {"small": (0.5, 12.0), "large": (0.75, None)}
    assert row.turns is None
    assert logged({**RESULT, **of_decision(request, Score(0.25, 0.0), None), "prompt": "Hi"}).turns == [
        Turn("user", "Hi")
    ]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"kind": "decision"},
        {"kind": "rating", "time": 1, "request": "a", "tier": "small", "quality": 2, "source": "caller"},
        {"prompt": "Hi", "small_ok": 1},
        {**RESULT, "score": "high", "features": {}, "hints": {}, "tiers": {}, "choice": "", "chances": {}},
        {**RESULT, "score": 1, "features": {}, "hints": {}, "tiers": {}, "choice": "small", "chances": {}},
        {**RESULT, "score": 1, "features": {}, "hints": {}, "tiers": {}, "choice": "", "chances": {}}
        | {"weighed": {"good": [0.5], "cost": [], "weight": 1}},
        {**RESULT, "score": 1, "features": [], "hints": {}, "tiers": {}, "choice": "", "chances": {}},
        {**RESULT, "score": 1, "features": {"a": math.nan}, "hints": {}, "tiers": {}, "choice": ""}
        | {"chances": {}},
        {**RESULT, "score": 1, "features": {}, "hints": {}, "tiers": {}, "choice": "", "chances": {"a": 2}},
        {**RESULT, "score": 1, "features": {}, "hints": {}, "tiers": {}, "choice": "", "chances": {}}
        | {"cost": 10**400},
    ],
)
def test_other_rows_are_rejected(row: dict[str, Any]) -> None:
    with pytest.raises(BadRecord, match="not a row of a decision log"):
        parse(row)


def at(time: float, tenant: str = "", request: str = "q1") -> Logged:
    fields = of_decision(RoutingRequest(0.5, Hints()), Score(0.5, 0.0), None)
    return logged({**RESULT, **fields, "time": time, "tenant": tenant, "request": request})


def test_a_rating_is_about_the_tenants_last_request_before_it() -> None:
    """Callers may choose request ids and use them again, and rate an answer late."""
    ratings = [
        Rated(15.0, "a", "q1", "small", 0.0, "caller"),
        Rated(25.0, "a", "q1", "small", 1.0, "caller"),
        Rated(26.0, "a", "q1", "large", 0.5, "judge"),
        Rated(5.0, "a", "q1", "small", 0.25, "caller"),
        Rated(99.0, "b", "q2", "small", 0.25, "caller"),
    ]
    first, second, other = join([*ratings, at(20.0, "a"), at(10.0, "a"), at(21.0, "b")])

    assert first.qualities == {("caller", "small"): 0.0}
    assert second.qualities == {("caller", "small"): 1.0, ("judge", "large"): 0.5}
    assert other.qualities == {}


def test_a_rating_that_names_its_answer_is_about_no_other() -> None:
    first, second, third = (
        replace(at(time), answer=name) for time, name in ((1.0, "a"), (2.0, "b"), (3.0, ""))
    )
    join([first, second, third, Rated(9.0, "", "q1", "small", 0.5, "caller", "a")])
    join([first, second, third, Rated(9.0, "", "q1", "small", 0.5, "caller", "unknown")])

    assert [one.qualities for one in (first, second, third)] == [{("caller", "small"): 0.5}, {}, {}]


def test_of_two_ratings_by_one_source_the_last_counts() -> None:
    ratings = [Rated(12.0, "", "q1", "small", 0.2, "judge"), Rated(11.0, "", "q1", "small", 0.9, "judge")]
    (only,) = join([at(10.0), *ratings])

    assert only.qualities == {("judge", "small"): 0.2}
