"""What another scorer would have chosen follows the policy, in the state of the tiers at that time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.changes.candidates import allowed, would_choose
from headrace.routing.policy import decide
from headrace.routing.request import Hints
from headrace.routing.success.choosing import Weighed
from headrace.routing.tier_view import TierView

NAMES = ("small", "medium", "large")
hints = st.builds(
    Hints,
    min_tier=st.sampled_from(["", "small", "medium"]),
    max_tier=st.sampled_from(["", "medium", "large"]),
    quality_preference=st.sampled_from([0.2, 0.5, 0.8]),
)
scores = st.floats(0, 1)
thresholds = st.lists(scores, min_size=2, max_size=2).map(lambda two: [0.0, *sorted(two)])


@given(
    score=scores,
    other=scores,
    asked=hints,
    now=thresholds,
    then=thresholds,
    up=st.lists(st.booleans(), min_size=3, max_size=3),
    floor=st.sampled_from(["", *NAMES]),
)
def test_the_candidate_chooses_as_if_it_were_in_use(
    score: float, other: float, asked: Hints, now: list[float], then: list[float], up: list[bool], floor: str
) -> None:
    up[1] = True  # so that one of the allowed tiers can serve

    def tiers(marks: list[float]) -> list[TierView]:
        return [TierView(name, mark, ok) for name, mark, ok in zip(NAMES, marks, up, strict=True)]

    decision = decide(score, asked, tiers(now), floor=floor)

    assert would_choose(decision, score, asked, now) == decision.tier
    assert would_choose(decision, other, asked, then) == decide(other, asked, tiers(then), floor=floor).tier


@given(score=scores, good=st.lists(scores, min_size=3, max_size=3), floor=st.sampled_from(["", *NAMES]))
def test_a_candidate_with_estimates_chooses_by_them(score: float, good: list[float], floor: str) -> None:
    tiers = [TierView(name, place / 3) for place, name in enumerate(NAMES)]
    decision = decide(score, Hints(), tiers, floor=floor)
    weighed = Weighed(tuple(good), (0.0, 0.0, 0.0), 0.0)
    chosen = would_choose(decision, score, Hints(), [0.0, 0.5, 0.9], weighed)

    assert chosen == decide(score, Hints(), tiers, floor=floor, weighed=weighed).tier


def test_only_tiers_that_the_hints_allow_are_allowed() -> None:
    tiers = [TierView(name, place / 3) for place, name in enumerate(NAMES)]

    assert allowed(decide(0.1, Hints(max_tier="medium"), tiers)) == ["small", "medium"]
    assert allowed(decide(0.1, Hints(tier="small"), tiers)) == ["small"]
