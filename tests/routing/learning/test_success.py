"""Chances of success follow outcomes as far as these support it, and are calibrated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.learning.calibrated import calibrated
from headrace.routing.learning.logistic import logistic, probability
from headrace.routing.learning.success import Fitted, Outcomes, fit
from headrace.routing.learning.tradeoff import Array
from headrace.routing.learning.weights import bounded, recency

KINDS = 2
TIERS = ("general", "code")


def truth(inputs: Array) -> Array:
    """Return the true chances [P, 2]: one tier is good at one kind of prompt, the other at the other."""
    code = inputs[:, -1]
    hard = inputs[:, 0]
    return np.column_stack([0.85 - 0.6 * code - 0.1 * hard, 0.2 + 0.65 * code - 0.1 * hard])


def outcomes(count: int, seed: int, tiers: int = 2) -> Outcomes:
    """Return outcomes of prompts, of which one tier each has answered."""
    rng = np.random.default_rng(seed)
    code = (rng.random(count) < 0.5).astype(float)
    inputs = np.column_stack([rng.random((count, 6)), 1 - code, code])
    tier = rng.integers(0, tiers, count)
    good = (rng.random(count) < truth(inputs)[np.arange(count), tier]).astype(float)
    return Outcomes(inputs, np.arange(count), tier, good, np.ones(count), tokens=50 + 100 * code + 20 * tier)


def error(fitted: Fitted, seed: int) -> float:
    """Return the root mean squared distance of the estimates from the truth on other prompts."""
    inputs = outcomes(1000, seed).inputs
    return float(np.sqrt(((fitted.heads.good(inputs) - truth(inputs)) ** 2).mean()))


def test_tiers_that_are_good_at_different_prompts_are_told_apart_by_two_hundred_outcomes() -> None:
    fitted = fit(TIERS, outcomes(200, seed=1), kinds=KINDS)

    unseen = outcomes(1000, seed=2).inputs
    best = fitted.heads.good(unseen).argmax(axis=1)
    assert (best == truth(unseen).argmax(axis=1)).mean() > 0.95
    assert fitted.heads.rows[0] + fitted.heads.rows[1] == 200
    for measured in fitted.measured:
        assert measured.brier < measured.base - 0.05


def test_more_outcomes_bring_the_estimates_closer_to_the_truth() -> None:
    few, some, many = (
        np.mean([error(fit(TIERS, outcomes(count, seed), kinds=KINDS), seed + 100) for seed in range(3)])
        for count in (40, 200, 2000)
    )

    assert many < some < few
    assert many < 0.05


def test_outcomes_without_information_give_base_rates() -> None:
    rng = np.random.default_rng(33)
    noise = replace(outcomes(60, seed=3), good=(rng.random(60) < 0.3).astype(float))

    fitted = fit(TIERS, noise, kinds=KINDS)

    chances = fitted.heads.good(noise.inputs)
    assert chances.std(axis=0).max() < 0.03
    assert chances.mean() == pytest.approx(0.3, abs=0.12)


def test_estimates_mean_what_they_say() -> None:
    fitted = fit(TIERS, outcomes(2000, seed=5), kinds=KINDS)
    unseen = outcomes(4000, seed=6)

    expected = fitted.heads.good(unseen.inputs)[np.arange(4000), unseen.tier]

    assert calibrated(expected, unseen.good).error < 0.04
    assert max(measured.error for measured in fitted.measured) < 0.06


def test_calibration_counts_outcomes_by_their_weight() -> None:
    """A weight of n is that of n outcomes, also for the bins."""
    rng = np.random.default_rng(16)
    expected = rng.permutation(200) / 200
    actual = (rng.random(200) < expected**2).astype(float)
    weights = np.where(expected < 0.6, 1, 6)

    weighted = calibrated(expected, actual, weights.astype(float))
    repeated = calibrated(np.repeat(expected, weights), np.repeat(actual, weights))

    for name in ("mean", "brier", "base"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name))
    assert weighted.error == pytest.approx(repeated.error, abs=0.01)
    pairs = [[(part.expected, part.actual) for part in found.bins] for found in (weighted, repeated)]
    assert np.array(pairs[0]) == pytest.approx(np.array(pairs[1]), abs=0.03)
    assert calibrated(expected, actual, np.zeros(200)) == calibrated(expected, actual)


def test_the_figures_are_those_of_the_outcomes_that_count() -> None:
    """Not those of a tier that has changed, or of a tenant whose outcomes count little."""
    honest, false = outcomes(400, seed=17), outcomes(2000, seed=18)
    every = Outcomes(
        np.vstack([honest.inputs, false.inputs]),
        np.arange(2400),
        np.concatenate([honest.tier, false.tier]),
        np.concatenate([honest.good, 1 - false.good]),
        np.concatenate([np.ones(400), np.full(2000, 0.01)]),
        np.concatenate([honest.tokens, false.tokens]),
    )

    for measured in fit(TIERS, every, kinds=KINDS).measured:
        assert measured.brier < measured.base - 0.03


def test_expected_lengths_follow_tier_and_kind() -> None:
    fitted = fit(TIERS, outcomes(2000, seed=7), kinds=KINDS)

    assert fitted.heads.tokens == pytest.approx(np.array([[50, 150], [70, 170]]), abs=6)


def test_a_fit_is_the_same_every_time() -> None:
    first, second = (fit(TIERS, outcomes(100, seed=8), kinds=KINDS).heads for _ in range(2))

    assert (first.weights == second.weights).all()


def test_too_few_outcomes_and_equal_ones_are_rejected() -> None:
    known = outcomes(100, seed=9)
    with pytest.raises(ValueError, match="code has 3"):
        fit(TIERS, known.only((known.tier == 0) | (np.cumsum(known.tier) <= 3)), kinds=KINDS)
    with pytest.raises(ValueError, match="the same"):
        fit(TIERS, replace(known, good=np.ones(100)), kinds=KINDS)


def test_one_tenant_with_reversed_outcomes_changes_little_if_its_weight_is_bounded() -> None:
    honest, false = outcomes(400, seed=10), outcomes(2000, seed=11)
    every = Outcomes(
        np.vstack([honest.inputs, false.inputs]),
        np.arange(2400),
        np.concatenate([honest.tier, false.tier]),
        np.concatenate([honest.good, 1 - false.good]),
        np.ones(2400),
        np.concatenate([honest.tokens, false.tokens]),
    )
    tenants = [f"honest {place % 10}" if place < 400 else "false" for place in range(2400)]

    trusted = error(fit(TIERS, every, kinds=KINDS), 12)
    weighted = error(fit(TIERS, replace(every, weight=bounded(every.weight, tenants)), kinds=KINDS), 12)

    assert trusted > 0.3, "without a bound, the false outcomes decide"
    assert weighted < 0.2


@given(counts=st.lists(st.integers(1, 300), min_size=1, max_size=12), most=st.floats(0.05, 1))
def test_no_reporter_has_more_than_its_share(counts: list[int], most: float) -> None:
    reporters = [str(place) for place, count in enumerate(counts) for _ in range(count)]

    weights = bounded(np.ones(len(reporters)), reporters, most=most)

    totals = [weights[[name == str(place) for name in reporters]].sum() for place in range(len(counts))]
    others = sum(counts) - max(counts)
    share = max(most, 1 / max(sum(count >= 5 for count in counts), 1))
    if others < 50:
        assert totals == counts, "nothing is discarded if there is hardly anybody else"
    else:
        kept = sum(totals) - totals[int(np.argmax(counts))]
        least = min(500.0, others / 2)
        assert kept > least * (1 - 1e-9), "the others keep enough"
        assert max(totals) <= share * sum(totals) * (1 + 1e-9) or kept == pytest.approx(least)
        smallest = min(totals)
        assert all(total == count for total, count in zip(totals, counts, strict=True) if count <= smallest)


def test_a_hundred_reporters_of_one_outcome_each_all_count() -> None:
    assert bounded(np.ones(100), [str(place) for place in range(100)]).tolist() == [1.0] * 100


def test_a_small_reporter_does_not_discard_the_outcomes_of_large_ones() -> None:
    """With five reporters, a fifth each would be six outcomes each, of four thousand."""
    reporters = [str(place // 1000) for place in range(4006)]

    assert bounded(np.ones(4006), reporters).sum() > 600


def test_outcomes_of_a_few_prompts_are_rejected() -> None:
    """Nothing can be left out to measure with, and base rates would count twice."""
    known = outcomes(1000, seed=14)
    few = replace(known.only(np.arange(1000) < 60), prompt=np.repeat(np.arange(4), 15))
    with pytest.raises(ValueError, match=r"too few prompts .*\(4\)"):
        fit(TIERS, few, kinds=KINDS)
    with pytest.raises(ValueError, match=r"too few prompts .*\(1\)"):
        fit(TIERS, replace(known, weight=np.where(np.arange(1000) == 7, 1.0, 1e-300)), kinds=KINDS)


def test_outcomes_of_five_prompts_of_many_are_measured_on_prompts_that_were_left_out() -> None:
    known = outcomes(1000, seed=15)
    few = replace(known.only(np.arange(1000) < 100), prompt=np.repeat([1, 2, 3, 5, 8], 20))

    fitted = fit(TIERS, few, kinds=KINDS)

    rates = [few.good[few.tier == tier].mean() for tier in range(2)]
    assert fitted.heads.good(few.inputs[few.prompt]).mean(axis=0) == pytest.approx(rates, abs=0.1)


def test_an_old_outcome_counts_half_after_each_half_life() -> None:
    ages = np.array([0.0, 30.0, 60.0, np.nan, -5.0])

    assert recency(ages, 30.0).tolist() == [1.0, 0.5, 0.25, 1.0, 1.0]


def test_logistic_regression_finds_the_slopes_and_shrinks_them() -> None:
    rng = np.random.default_rng(13)
    inputs = np.column_stack([rng.normal(size=(4000, 2)), np.ones(4000)])
    chance = probability(inputs @ np.array([1.0, -2.0, 0.5]))
    known = {"weights": np.ones(4000)}

    found = logistic(inputs, chance, strengths=np.full(3, 1e-6), **known)
    shrunk = logistic(inputs, chance, strengths=np.array([1000.0, 1000.0, 0.0]), **known)

    assert found == pytest.approx([1.0, -2.0, 0.5], abs=1e-4)
    assert np.abs(shrunk[:2]).sum() < 0.7 * np.abs(found[:2]).sum()
    separable = logistic(inputs, (inputs[:, 0] > 0).astype(float), strengths=np.full(3, 1.0), **known)
    assert np.isfinite(separable).all()
