"""A configured share is kept on any traffic, also while it changes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.share import ShareKeeper


def places(keeper: ShareKeeper, scores: list[float]) -> list[int]:
    """Return the tier of each score by the thresholds."""
    found = []
    for score in scores:
        marks = keeper.thresholds()
        assert marks[0] == 0
        assert marks == sorted(marks)
        place = max(place for place, mark in enumerate(marks) if score >= mark)
        keeper.record(score, place)
        found.append(place)
    return found


@given(scores=st.lists(st.floats(0, 1), max_size=300), share=st.floats(0, 1), data=st.data())
def test_the_share_of_any_run_of_calls_is_off_by_a_few_at_most(
    scores: list[float], share: float, data: st.DataObject
) -> None:
    """The documented bound, for any scores and any run of calls."""
    correction = data.draw(st.floats(1, 32))
    sent = places(ShareKeeper([share], correction=correction), scores)

    for start in range(0, len(sent), 7):
        for stop in range(start, len(sent), 7):
            stretch = sent[start:stop]
            assert abs(sum(stretch) - share * len(stretch)) <= correction + 1 + 1e-6


def unsteady(generator: random.Random, count: int) -> list[float]:
    """Constant, rising, falling and random scores, which make the tiers' debts diverge."""
    scores: list[float] = []
    while len(scores) < count:
        start, run = generator.random(), generator.randint(1, 80)
        rise = generator.choice([0.0, 0.002, -0.002])
        width = generator.choice([0.0, 0.0, 1 - start])
        scores += [min(max(start + rise * at + width * generator.random(), 0), 1) for at in range(run)]
    return scores[:count]


@pytest.mark.parametrize("correction", [2, 8])
@pytest.mark.parametrize("shares", [[0.02, 0.4], [0.05, 0.4, 0.3], [0.02, 0.4, 0.3, 0.0]])
def test_the_share_of_each_of_many_tiers_is_off_by_a_few_at_most(
    shares: list[float], correction: int
) -> None:
    """The documented bound, for any number of tiers."""
    for seed in range(20):
        sent = places(ShareKeeper(shares, correction=correction), unsteady(random.Random(seed), 500))

        for tier, share in enumerate([1 - sum(shares), *shares]):
            debt, lowest, highest = 0.0, 0.0, 0.0
            for place in sent:
                debt += (place == tier) - share
                lowest, highest = min(lowest, debt), max(highest, debt)
            # Two points of the running debt are a stretch of calls.
            assert highest - lowest <= correction + 2


def family(generator: random.Random, low: float, high: float, count: int) -> list[float]:
    return [generator.uniform(low, high) for _ in range(count)]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_stream_that_shifts_between_families_keeps_its_share_within_five_points(share: float) -> None:
    """Families without overlap: a fixed threshold would send all of one to the large tier."""
    generator = random.Random(1)
    scores = [
        *family(generator, 0.0, 0.3, 400),
        *family(generator, 0.6, 1.0, 400),
        *[0.95] * 400,
        *family(generator, 0.2, 0.5, 400),
    ]
    sent = places(ShareKeeper([share]), scores)

    for start in range(len(sent) - 200):
        assert abs(sum(sent[start : start + 200]) / 200 - share) <= 0.05


def test_on_steady_traffic_the_higher_scores_go_to_the_larger_tier() -> None:
    generator = random.Random(2)
    scores = family(generator, 0, 1, 2000)
    sent = places(ShareKeeper([0.3]), scores)

    up = [score for score, place in zip(scores, sent, strict=True) if place]
    assert sum(score >= 0.7 for score in up) / len(up) > 0.75


def test_three_tiers_get_their_shares() -> None:
    generator = random.Random(3)
    scores = [*family(generator, 0, 0.5, 500), *family(generator, 0.5, 1, 500)]
    sent = places(ShareKeeper([0.3, 0.1]), scores)

    assert sent.count(1) / len(sent) == pytest.approx(0.3, abs=0.03)
    assert sent.count(2) / len(sent) == pytest.approx(0.1, abs=0.03)


def test_initial_scores_determine_the_first_thresholds() -> None:
    keeper = ShareKeeper([0.25], seen=[0.1, 0.2, 0.3, 0.4])

    assert keeper.thresholds() == [0, 0.4]


def test_escalated_calls_count_towards_the_share() -> None:
    keeper = ShareKeeper([0.5], seen=[step / 10 for step in range(10)])
    before = keeper.thresholds()[1]

    for _ in range(3):
        keeper.record(0.1, 0)
        keeper.record_escalation(0, 1)

    assert keeper.thresholds()[1] > before
