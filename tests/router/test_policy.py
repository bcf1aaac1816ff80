"""The policy respects every hint, never picks an unhealthy tier, and rises with the score."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.router.policy import Decision, Hints, TierView, decide, thresholds

NAMES = ("nano", "small", "medium", "large", "huge")


@st.composite
def tier_lists(draw: st.DrawFn) -> list[TierView]:
    count = draw(st.integers(1, 5))
    marks = [0.0, *sorted(draw(st.lists(st.floats(0, 1), min_size=count - 1, max_size=count - 1)))]
    return [
        TierView(name, mark, draw(st.booleans()), f"m-{name}")
        for name, mark in zip(NAMES, marks, strict=False)
    ]


@st.composite
def hints_for(draw: st.DrawFn, names: list[str]) -> Hints:
    some = st.one_of(st.just(""), st.sampled_from(names))
    return Hints(
        tier=draw(some),
        min_tier=draw(some),
        max_tier=draw(some),
        quality_preference=draw(st.floats(0, 1)),
        allow_escalation=draw(st.booleans()),
    )


def place(tiers: list[TierView], name: str) -> int:
    return [tier.name for tier in tiers].index(name)


@given(data=st.data(), tiers=tier_lists(), score=st.floats(0, 1))
def test_every_decision_keeps_the_hints_and_is_healthy(
    data: st.DataObject, tiers: list[TierView], score: float
) -> None:
    hints = data.draw(hints_for([tier.name for tier in tiers]))
    try:
        decision = decide(score, hints, tiers)
    except (errors.HintsConflict, errors.NoWorkers):
        return

    at = place(tiers, decision.tier)
    assert tiers[at].healthy
    assert not hints.tier or decision.tier == hints.tier
    assert not hints.min_tier or at >= place(tiers, hints.min_tier)
    assert not hints.max_tier or at <= place(tiers, hints.max_tier)
    assert [candidate.tier.name for candidate in decision.candidates] == [tier.name for tier in tiers]
    chosen = [candidate for candidate in decision.candidates if candidate.reason == "chosen"]
    assert [candidate.tier.name for candidate in chosen] == [decision.tier]


@given(data=st.data(), tiers=tier_lists(), scores=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_higher_score_never_means_a_smaller_tier(
    data: st.DataObject, tiers: list[TierView], scores: tuple[float, float]
) -> None:
    """With all tiers healthy: an unhealthy one may send a middling score further up than a high one."""
    tiers = [TierView(tier.name, tier.threshold) for tier in tiers]
    hints = data.draw(hints_for([tier.name for tier in tiers]))
    try:
        low, high = (place(tiers, decide(score, hints, tiers).tier) for score in sorted(scores))
    except errors.HintsConflict:
        return

    assert low <= high


@given(tiers=tier_lists(), score=st.floats(0, 1), data=st.data())
def test_the_preference_moves_the_choice_its_way(
    tiers: list[TierView], score: float, data: st.DataObject
) -> None:
    tiers = [TierView(tier.name, tier.threshold) for tier in tiers]
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))

    cheap = decide(score, Hints(quality_preference=low), tiers).tier
    good = decide(score, Hints(quality_preference=high), tiers).tier

    assert place(tiers, cheap) <= place(tiers, good)
    assert decide(score, Hints(quality_preference=1), tiers).tier == tiers[-1].name


def two(small: bool = True, large: bool = True) -> list[TierView]:
    return [TierView("small", 0.0, small, "s"), TierView("large", 0.5, large, "l")]


def test_an_unhealthy_tier_is_passed_over_upwards_then_downwards() -> None:
    assert decide(0.1, Hints(), two(small=False)).tier == "large"
    assert decide(0.9, Hints(), two(large=False)).tier == "small"


def test_without_escalation_an_unhealthy_tier_is_an_answer() -> None:
    with pytest.raises(errors.NoWorkers):
        decide(0.1, Hints(allow_escalation=False), two(small=False))


def test_a_tier_that_failed_the_request_is_not_tried_again() -> None:
    assert decide(0.1, Hints(), two(), exclude=["small"]).tier == "large"
    with pytest.raises(errors.NoWorkers):
        decide(0.1, Hints(tier="small"), two(), exclude=["small"])


def test_a_model_pin_finds_its_tier() -> None:
    assert decide(0.0, Hints(model="l"), two()).tier == "large"


def test_the_reason_names_score_bound_and_health() -> None:
    def why(decision: Decision) -> str:
        return decision.why

    assert "score 0.20" in why(decide(0.2, Hints(), two()))
    assert "the bounds moved it to 'large'" in why(decide(0.2, Hints(min_tier="large"), two()))
    assert "'small' cannot serve" in why(decide(0.2, Hints(), two(small=False)))


def test_default_thresholds_are_even() -> None:
    assert thresholds(4) == [0, 0.25, 0.5, 0.75]
