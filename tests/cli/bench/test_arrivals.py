"""Requests are planned for the rate."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.bench.arrivals import arrivals


@given(
    rate=st.floats(0.1, 1000),
    burstiness=st.sampled_from([0.2, 1.0, 4.0, math.inf]),
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 200),
)
def test_a_number_of_requests_takes_the_time_of_the_rate(
    rate: float, burstiness: float, seed: int, requests: int
) -> None:
    plan = list(arrivals(rate, burstiness=burstiness, seed=seed, requests=requests))

    assert len(plan) == requests
    assert plan == sorted(plan)
    assert plan[-1] == pytest.approx(requests / rate)


def test_the_same_seed_gives_the_same_plan() -> None:
    first, again, other = (list(arrivals(5, seed=seed, requests=50)) for seed in (1, 1, 2))

    assert first == again
    assert first != other


def test_no_request_is_planned_after_the_time() -> None:
    plan = list(arrivals(200, seed=3, seconds=20))

    assert 0 < plan[-1] <= 20
    assert len(plan) == pytest.approx(4000, rel=0.1), "as many as the rate says, over several blocks"
    assert list(arrivals(200, seed=3, seconds=20, requests=10)) == plan[:10]


def test_without_a_limit_the_plan_does_not_end() -> None:
    assert len(list(islice(arrivals(1), 5000))) == 5000


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0), (math.inf, 0.0)])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float, variation: float) -> None:
    """The coefficient of variation of a gamma distribution is 1 / sqrt(shape)."""
    plan = list(islice(arrivals(100, burstiness=burstiness, seed=7), 20_000))
    between = [later - earlier for earlier, later in pairwise([0.0, *plan])]

    assert numpy.mean(between) == pytest.approx(0.01, rel=0.05)
    assert numpy.std(between) / numpy.mean(between) == pytest.approx(variation, rel=0.05, abs=1e-6)
