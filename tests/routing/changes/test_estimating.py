"""Estimates from a log with chance agree with the truth, and the log says when it cannot tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.changes.estimating import MIN_EVIDENCE, Array, Places, Sample, compare


def good_of(features: Array) -> Array:
    """Return the probability of a good answer, [n, 2]: tier 1 gains where the first column is high."""
    weights = np.array([[-1.2, 0.3, 0.0, 0.0], [-0.3, 0.0, 0.3, 0.0]])
    log_odds = features @ weights.T + [0.5, 1.2]
    return np.asarray(1 / (1 + np.exp(-log_odds)))


def traffic(
    seed: int, *, rows: int = 2000, explored: float = 0.1, rated: tuple[float, float] = (1.0, 1.0)
) -> tuple[Sample, float]:
    """Return logged requests, and the true difference in quality between candidate and logged policy."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, 4))
    every = np.arange(rows)
    usual = (features[:, 0] + 0.8 * rng.normal(size=rows) > 0.5).astype(int)
    candidate = (features[:, 0] + 0.3 * features[:, 3] > 0.5).astype(int)
    chances = np.full((rows, 2), explored / 2)
    chances[every, usual] += 1 - explored
    choice = (rng.random(rows) < chances[:, 1]).astype(int)
    good = good_of(features)
    results = np.full((rows, 2), np.nan)
    known = rng.random(rows) < np.array(rated)[choice]
    drawn = (rng.random(rows) < good[every, choice]).astype(float)
    results[every, choice] = np.where(known, drawn, np.nan)
    truth = good[every, candidate] - (good * chances).sum(axis=1)
    return Sample(features, chances, choice, candidate, results, every), float(truth.mean())


@pytest.mark.parametrize("rated", [(1.0, 1.0), (0.3, 0.6)], ids=["all rated", "tiers rated unequally"])
def test_the_intervals_hold_the_truth_about_as_often_as_they_say(rated: tuple[float, float]) -> None:
    """In 200 runs, a 95 % interval misses about 10 times; more than 20 times has a chance of 2 in 1,000."""
    missed, errors = 0, []
    for seed in range(200):
        sample, truth = traffic(seed, rated=rated)
        found = compare(sample, bounded=True)
        missed += not found.difference.low <= truth <= found.difference.high
        errors.append(found.difference.value - truth)

    assert missed <= 20
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(len(errors)), "it has no bias"


@st.composite
def complete_samples(draw: st.DrawFn) -> tuple[Sample, float]:
    """Draw requests that each occur ten times, sent to each of three tiers as often as its chance says.

    With them comes the true mean result of the candidate.
    """
    requests = draw(st.integers(2, 12))
    tenths = [draw(st.permutations(draw(st.sampled_from(_TENTHS)))) for _ in range(requests)]
    result = np.array(draw(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=requests, max_size=requests)))
    wanted = [draw(st.sampled_from([tier for tier in range(3) if own[tier]])) for own in tenths]
    request = np.repeat(np.arange(requests), 10)
    choice = np.array([tier for own in tenths for tier in range(3) for _ in range(own[tier])])
    every = np.arange(len(request))
    results = np.full((len(request), 3), np.nan)
    results[every, choice] = result[request, choice]
    features = np.arange(requests, dtype=float)[request][:, None]
    chances = np.array(tenths)[request] / 10
    sample = Sample(features, chances, choice, np.array(wanted)[request], results, request)
    return sample, float(result[np.arange(requests), wanted].mean())


_TENTHS = [(10, 0, 0), (9, 1, 0), (8, 1, 1), (5, 4, 1), (4, 3, 3)]


@given(drawn=complete_samples())
def test_estimates_are_exact_if_each_choice_is_as_frequent_as_its_chance(drawn: tuple[Sample, float]) -> None:
    """Whatever the model predicts, and for any number of tiers: the weights undo the choices."""
    sample, truth = drawn
    found = compare(sample, bounded=True)

    assert found.ips.value == pytest.approx(truth)
    assert found.snips.value == pytest.approx(truth)
    assert found.dr.value == pytest.approx(truth)
    assert found.difference.value == pytest.approx(truth - found.logged.value)
    assert found.unsupported == 0


def test_with_every_tier_equally_probable_the_weighted_estimates_are_exact_means() -> None:
    """Then the candidate's value is the mean over the requests on which chance agreed with it."""
    sample, _ = traffic(1, explored=1.0)
    found = compare(sample, bounded=True)
    agrees = sample.candidate == sample.choice
    own = sample.results[np.arange(len(agrees)), sample.choice]

    assert found.snips.value == pytest.approx(own[agrees].mean())
    assert found.ips.value == pytest.approx(2 * own[agrees].sum() / len(own))
    assert found.effective_rows == pytest.approx(agrees.sum())


def test_where_chance_alone_decides_no_candidate_decides_as_logged() -> None:
    sample, _ = traffic(1, explored=1.0)
    found = compare(replace(sample, candidate=np.zeros_like(sample.candidate)), bounded=True)

    assert found.differ == 1
    assert found.evidence == (sample.choice == 0).sum()
    assert found.problem == ""


def test_tiers_whose_answers_are_rated_more_often_do_not_count_more() -> None:
    """All answers of tier 1 are good, and none of tier 0: the value is the share that goes to tier 1."""
    sample, _ = traffic(9, rows=4000, explored=1.0, rated=(0.2, 0.8))
    results = np.where(np.isnan(sample.results), np.nan, [[0.0, 1.0]])
    found = compare(replace(sample, results=results), bounded=True)
    share = sample.candidate.mean()

    assert found.ips.value == pytest.approx(share, abs=0.05)
    assert found.snips.value == pytest.approx(share, abs=0.05)
    assert found.dr.value == pytest.approx(share, abs=0.05)


def test_the_logged_policy_itself_has_no_difference() -> None:
    sample, _ = traffic(2, explored=0.0)
    found = compare(replace(sample, candidate=sample.choice), bounded=True)

    assert found.difference.value == pytest.approx(0)
    assert found.dr.low == pytest.approx(found.logged.low)
    assert found.problem == ""
    assert found.logged.value == pytest.approx(np.nanmean(sample.results))


def test_a_log_without_chance_cannot_tell() -> None:
    sample, _ = traffic(3, explored=0.0)
    found = compare(sample, bounded=True)

    assert found.unsupported == pytest.approx(found.differ)
    assert "no results of the tier" in found.problem
    assert found.difference.high - found.difference.low > 2 * found.unsupported, "anything could be there"


def test_a_log_with_few_results_where_the_policies_differ_cannot_tell() -> None:
    sample, _ = traffic(4, rows=200, explored=0.05)
    found = compare(sample, bounded=True)

    assert found.evidence < MIN_EVIDENCE
    assert f"only {found.evidence} of those have a result" in found.problem


def test_a_few_equal_results_do_not_look_certain() -> None:
    """Ten good answers in a row are possible with a probability of a good answer of 0.75."""
    sample, _ = traffic(5, rows=1000, explored=0.1)
    certain = np.where(np.isnan(sample.results), np.nan, 1.0)
    found = compare(replace(sample, results=certain), bounded=True)

    assert found.snips.value == pytest.approx(1)
    assert found.difference.low < -0.01


def test_requests_of_one_tenant_count_as_one() -> None:
    """Otherwise, thousands of requests of two tenants would look like thousands of independent ones."""
    sample, _ = traffic(6, rows=2000, explored=0.5)
    rng = np.random.default_rng(6)
    tenants: Places = rng.integers(0, 25, 2000)
    easy = (rng.random(25) < 0.5).astype(float)[tenants]
    results = np.where(np.isnan(sample.results), np.nan, easy[:, None])
    alone = compare(replace(sample, results=results), bounded=True).logged
    together = compare(replace(sample, results=results, clusters=tenants), bounded=True).logged

    assert together.high - together.low > 3 * (alone.high - alone.low)


@pytest.mark.parametrize("where_they_differ", [False, True])
def test_shadow_requests_tell_without_exploration(where_they_differ: bool) -> None:
    """A sample of requests has results of both tiers, perhaps only where the candidate differs."""
    missed, errors = 0, []
    for seed in range(100):
        sample, truth = traffic(seed, rows=1500, explored=0.0)
        rng = np.random.default_rng(seed + 1000)
        every = np.arange(1500)
        drawn = rng.random(1500) < (0.5 if where_they_differ else 0.2)
        drawn &= (sample.candidate != sample.choice) | (not where_they_differ)
        results = sample.results.copy()
        other = 1 - sample.choice
        shadow = (rng.random(1500) < good_of(sample.features)[every, other]).astype(float)
        results[every[drawn], other[drawn]] = shadow[drawn]
        found = compare(replace(sample, results=results), bounded=True)
        assert found.problem == ""
        missed += not found.difference.low <= truth <= found.difference.high
        errors.append(found.difference.value - truth)

    assert missed <= 12, "5 are expected; more than 12 have a chance of 1 in 1,000"
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(len(errors)), "it has no bias"


def test_a_tier_without_results_cannot_be_compared() -> None:
    """A judge that knows the outcome of the smaller tier alone, for example."""
    sample, _ = traffic(7, explored=0.5, rated=(1.0, 0.0))
    found = compare(sample, bounded=True)

    assert "no results of the tier in question" in found.problem


def test_without_any_result_there_is_nothing_to_estimate() -> None:
    sample, _ = traffic(8)
    with pytest.raises(ValueError, match="no result is known"):
        compare(replace(sample, results=np.full_like(sample.results, np.nan)))
