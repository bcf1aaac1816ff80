"""The policy respects every hint, never picks an unhealthy tier, and rises with the score."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.no_route import ConflictingHints, NoSuchModel, NoTierAvailable
from headrace.routing.policy import Decision, decide
from headrace.routing.request import Hints
from headrace.routing.tier_view import Price, TierView, even_thresholds

NAMES = ("nano", "small", "medium", "large", "huge")


@st.composite
def tier_lists(draw: st.DrawFn) -> list[TierView]:
    """Draw tiers in any state: down, full, slow, with and without prices."""
    count = draw(st.integers(1, 5))
    marks = [0.0, *sorted(draw(st.lists(st.floats(0, 1), min_size=count - 1, max_size=count - 1)))]
    prices = st.none() | st.builds(Price, st.floats(0, 10), st.floats(0, 10))
    return [
        TierView(
            name,
            mark,
            draw(st.booleans()),
            f"m-{name}",
            saturated=draw(st.booleans()),
            answer_seconds=draw(st.floats(0, 20)),
            price=draw(prices),
        )
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


seconds = st.just(math.inf) | st.floats(0, 20)


@given(data=st.data(), tiers=tier_lists(), score=st.floats(0, 1), left=seconds)
def test_every_decision_keeps_the_hints_and_is_healthy(
    data: st.DataObject, tiers: list[TierView], score: float, left: float
) -> None:
    names = [tier.name for tier in tiers]
    hints = data.draw(hints_for(names))
    floor = data.draw(st.sampled_from(["", *names]))
    failed = data.draw(st.lists(st.sampled_from(names), max_size=2))
    try:
        decision = decide(score, hints, tiers, floor=floor, seconds_left=left, exclude=failed)
    except (ConflictingHints, NoTierAvailable):
        return

    at = place(tiers, decision.tier)
    assert at == decision.place
    assert tiers[at].healthy
    assert decision.tier not in failed
    assert not hints.tier or decision.tier == hints.tier
    assert not hints.min_tier or at >= place(tiers, hints.min_tier)
    assert not hints.max_tier or at <= place(tiers, hints.max_tier)
    assert [candidate.tier.name for candidate in decision.candidates] == names
    chosen = [candidate for candidate in decision.candidates if candidate.reason == "chosen"]
    assert [candidate.tier.name for candidate in chosen] == [decision.tier]
    for name in decision.escalations:
        above = place(tiers, name)
        assert above > at
        assert tiers[above].healthy
        assert name not in failed
        assert hints.allow_escalation
        assert not hints.max_tier or above <= place(tiers, hints.max_tier)
        assert not hints.tier


@given(data=st.data(), tiers=tier_lists(), scores=st.tuples(st.floats(0, 1), st.floats(0, 1)), left=seconds)
def test_a_higher_score_never_means_a_smaller_tier(
    data: st.DataObject, tiers: list[TierView], scores: tuple[float, float], left: float
) -> None:
    """In any state of the tiers: a tier may be skipped, the order stays."""
    names = [tier.name for tier in tiers]
    hints = data.draw(hints_for(names))
    floor = data.draw(st.sampled_from(["", *names]))
    try:
        low, high = (
            decide(score, hints, tiers, floor=floor, seconds_left=left).place for score in sorted(scores)
        )
    except (ConflictingHints, NoTierAvailable):
        return

    assert low <= high


@given(tiers=tier_lists(), score=st.floats(0, 1), data=st.data())
def test_a_higher_quality_preference_never_chooses_a_smaller_tier(
    tiers: list[TierView], score: float, data: st.DataObject
) -> None:
    tiers = [TierView(tier.name, tier.threshold) for tier in tiers]
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))

    cheap = decide(score, Hints(quality_preference=low), tiers).place
    good = decide(score, Hints(quality_preference=high), tiers).place

    assert cheap <= good
    assert decide(score, Hints(quality_preference=1), tiers).tier == tiers[-1].name
    assert decide(score, Hints(quality_preference=0), tiers).tier == tiers[0].name


@given(tiers=tier_lists(), score=st.floats(0, 1), data=st.data())
def test_a_conversation_never_moves_down_while_its_tier_serves(
    tiers: list[TierView], score: float, data: st.DataObject
) -> None:
    tiers = [TierView(tier.name, tier.threshold) for tier in tiers]
    floor = data.draw(st.sampled_from([tier.name for tier in tiers]))

    assert decide(score, Hints(), tiers, floor=floor).place >= place(tiers, floor)


@given(tiers=tier_lists(), score=st.floats(0, 1), left=st.floats(0, 20))
def test_a_tier_that_would_be_late_is_chosen_only_if_all_would_be(
    tiers: list[TierView], score: float, left: float
) -> None:
    try:
        chosen = tiers[decide(score, Hints(), tiers, seconds_left=left).place]
    except NoTierAvailable:
        return

    in_time = [tier for tier in tiers if tier.healthy and tier.answer_seconds <= left]
    assert chosen in in_time or not in_time
    assert not chosen.saturated or all(tier.saturated for tier in in_time)


def two(small: bool = True, large: bool = True) -> list[TierView]:
    return [TierView("small", 0.0, small, "s"), TierView("large", 0.5, large, "l")]


def test_an_unhealthy_tier_is_replaced_by_a_larger_then_by_a_smaller_one() -> None:
    assert decide(0.1, Hints(), two(small=False)).tier == "large"
    assert decide(0.9, Hints(), two(large=False)).tier == "small"


def test_without_escalation_an_unhealthy_tier_is_an_error() -> None:
    with pytest.raises(NoTierAvailable):
        decide(0.1, Hints(allow_escalation=False), two(small=False))


def test_a_tier_that_failed_the_request_is_not_tried_again() -> None:
    assert decide(0.1, Hints(), two(), exclude=["small"]).tier == "large"
    with pytest.raises(NoTierAvailable):
        decide(0.1, Hints(tier="small"), two(), exclude=["small"])


def test_a_model_may_belong_to_a_tier_that_was_not_polled_yet() -> None:
    unseen = [TierView("small", 0.0, healthy=False), TierView("large", 0.5, model="l")]

    for hints in (Hints(model="s"), Hints(model="l", tier="small")):
        with pytest.raises(NoTierAvailable, match="small"):
            decide(0.0, hints, unseen)
    with pytest.raises(NoSuchModel):
        decide(0.0, Hints(model="s", min_tier="large"), unseen)


def test_a_model_pin_chooses_its_tier() -> None:
    assert decide(0.0, Hints(model="l"), two()).tier == "large"


def test_the_reason_names_score_bound_and_health() -> None:
    def why(decision: Decision) -> str:
        return decision.why

    assert "score 0.20" in why(decide(0.2, Hints(), two()))
    assert "the bounds moved it to 'large'" in why(decide(0.2, Hints(min_tier="large"), two()))
    assert "'small' cannot serve" in why(decide(0.2, Hints(), two(small=False)))


@pytest.mark.parametrize(
    ("decision", "cause"),
    [
        (decide(0.2, Hints(), two()), "score"),
        (decide(0.2, Hints(tier="small"), two()), "score"),  # the hint changes nothing
        (decide(0.2, Hints(), two(), floor="large"), "conversation"),
        (decide(0.2, Hints(min_tier="large"), two()), "hint"),
        (decide(0.2, Hints(), two(small=False)), "health"),
        (decide(0.2, Hints(), two(), exclude=["small"]), "health"),
        (decide(0.1, Hints(), [TierView("s", 0.0, saturated=True), TierView("l", 0.5)]), "load"),
        (
            decide(
                0.1, Hints(), [TierView("s", 0, price=Price(2, 2)), TierView("l", 0.5, price=Price(1, 1))]
            ),
            "price",
        ),
    ],
)
def test_the_cause_of_a_decision_is_one_of_few_words(decision: Decision, cause: str) -> None:
    assert decision.cause == cause


def test_a_full_tier_is_replaced_by_the_next() -> None:
    full = [TierView("small", 0.0, saturated=True), TierView("large", 0.5)]

    decision = decide(0.1, Hints(), full)

    assert decision.tier == "large"
    assert "'small' has a full queue" in decision.why
    assert decide(0.1, Hints(max_tier="small"), full).tier == "small"


def test_a_short_deadline_chooses_a_tier_that_meets_it() -> None:
    slow = [TierView("small", 0.0, answer_seconds=1.0), TierView("large", 0.5, answer_seconds=8.0)]

    assert decide(0.9, Hints(), slow).tier == "large"
    decision = decide(0.9, Hints(), slow, seconds_left=3.0)
    assert decision.tier == "small"
    assert "'large' would take 8.0 s of the 3.0 s left" in decision.why


def test_nobody_pays_more_for_a_smaller_model() -> None:
    odd = [TierView("small", 0.0, price=Price(2, 2)), TierView("large", 0.5, price=Price(1, 1))]

    assert decide(0.1, Hints(), odd).tier == "large"
    assert decide(0.1, Hints(max_tier="small"), odd).tier == "small"


def test_default_thresholds_are_even() -> None:
    assert even_thresholds(4) == [0, 0.25, 0.5, 0.75]
