"""The limits of a minute: what may be taken at once, how it refills, and what corrections do."""

from __future__ import annotations

from copy import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.upstream.limits.per_minute import Level, PerMinute


def test_a_full_minute_may_be_taken_at_once_and_then_a_request_waits_for_its_share() -> None:
    limits = PerMinute(requests=60, tokens=0, now=0.0)
    for _ in range(60):
        limits.admit(1000, 0.0)

    with pytest.raises(errors.Overloaded, match="requests per minute") as refused:
        limits.admit(1000, 0.5)

    assert refused.value.retry_after == pytest.approx(0.5)
    limits.admit(1000, 1.0)


def test_tokens_are_estimated_first_and_corrected_at_the_end() -> None:
    limits = PerMinute(requests=0, tokens=6000, now=0.0)
    first = limits.admit(5000, 0.0)
    with pytest.raises(errors.Overloaded, match="tokens per minute") as refused:
        limits.admit(5000, 0.0)
    assert refused.value.retry_after == pytest.approx(40.0)

    limits.correct(first, 100, 0.0)

    limits.admit(5000, 0.0)


def test_a_request_larger_than_the_limit_is_admitted_alone_and_paid_for_later() -> None:
    limits = PerMinute(requests=0, tokens=600, now=0.0)
    limits.admit(1200, 0.0)

    with pytest.raises(errors.Overloaded) as refused:
        limits.admit(10, 0.0)

    assert refused.value.retry_after == pytest.approx(61.0)


def test_retries_count_against_the_requests_of_a_minute() -> None:
    limits = PerMinute(requests=2, tokens=0, now=0.0)
    taken = limits.admit(1, 0.0)
    limits.sent(taken, 0.0)
    limits.sent(taken, 0.0)

    with pytest.raises(errors.Overloaded):
        limits.admit(1, 0.0)


def test_a_request_that_was_never_sent_is_given_back() -> None:
    limits = PerMinute(requests=1, tokens=10, now=0.0)
    limits.correct(limits.admit(10, 0.0), 0, 0.0)

    limits.sent(limits.admit(10, 0.0), 0.0)


@given(
    limit=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5000)), min_size=1, max_size=40),
)
def test_no_minute_takes_more_than_twice_the_limit_and_waits_are_exact(
    limit: int, steps: list[tuple[float, int]]
) -> None:
    level, now = Level(limit, 0.0), 0.0
    taken: list[tuple[float, int]] = []
    for pause, amount in steps:
        now += pause
        amount = min(amount, limit)
        wait = level.wait(amount, now)
        assert wait >= 0
        if wait == 0:
            level.take(amount, now)
            taken.append((now, amount))
        else:
            assert copy(level).wait(amount, now + wait * 1.000001 + 1e-6) == 0
    for since, _ in taken:
        assert sum(amount for at, amount in taken if since <= at < since + 60) <= 2 * limit + 1e-6
