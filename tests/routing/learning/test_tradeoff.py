"""The metrics match their published definitions."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.routing.learning.tradeoff import quality, recovered

RNG = np.random.default_rng(0)
WEAK = (RNG.random(4000) < 0.6).astype(float)
STRONG = np.maximum(WEAK, (RNG.random(4000) < 0.5).astype(float))


def test_a_random_router_has_the_chance_figures() -> None:
    found = [quality(np.random.default_rng(seed + 100).random(4000), WEAK, STRONG) for seed in range(20)]

    assert np.mean([each.apgr for each in found]) == pytest.approx(0.5, abs=0.01)
    assert np.mean([each.cpt50 for each in found]) == pytest.approx(50, abs=1)
    assert np.mean([each.cpt80 for each in found]) == pytest.approx(80, abs=1)


def test_scores_that_are_all_the_same_are_chance_whatever_the_order_of_rows() -> None:
    found = quality(np.zeros(4000), np.sort(WEAK), STRONG[np.argsort(WEAK)])

    assert (found.apgr, found.cpt50, found.cpt80) == pytest.approx((0.5, 50, 80))


def test_knowing_the_gains_recovers_all_of_the_gap_with_as_many_calls_as_there_are_gains() -> None:
    gains = STRONG - WEAK

    found = quality(gains, WEAK, STRONG)

    assert found.cpt50 == pytest.approx(50 * gains.mean())
    assert found.apgr > 0.85


def test_the_curve_goes_from_nothing_to_all() -> None:
    share, gap = recovered(RNG.random(4000), WEAK, STRONG)

    assert (share[0], gap[0], share[-1], gap[-1]) == pytest.approx((0, 0, 100, 1))


def test_a_weight_of_n_is_that_of_n_rows() -> None:
    scores, weights = RNG.integers(0, 20, 300) / 20, RNG.integers(1, 5, 300)
    repeated = [np.repeat(each, weights) for each in (scores, WEAK[:300], STRONG[:300])]

    weighted = quality(scores, WEAK[:300], STRONG[:300], weights)

    assert weighted.apgr == pytest.approx(quality(*repeated).apgr)
    assert weighted.cpt80 == pytest.approx(quality(*repeated).cpt80)


def test_without_a_gap_there_is_nothing_to_recover() -> None:
    with pytest.raises(ValueError, match="no better"):
        quality([0.1, 0.2], [1.0, 1.0], [1.0, 0.0])
