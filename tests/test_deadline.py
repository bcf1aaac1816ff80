"""A deadline is one value that all hops use."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from headrace.deadline import NEVER, Deadline

MOMENTS = st.floats(min_value=0, max_value=1e9)


def test_a_request_without_a_timeout_has_no_deadline() -> None:
    assert Deadline.after(None, 5.0) is NEVER
    assert not NEVER.exists
    assert NEVER.timeout_at is None
    assert NEVER.left(5.0) == math.inf
    assert not NEVER.passed(1e300)
    assert NEVER.earlier_by(1.0) == NEVER


@given(now=MOMENTS, seconds=st.floats(min_value=0, max_value=1e6))
def test_a_deadline_has_passed_when_no_time_is_left(now: float, seconds: float) -> None:
    deadline = Deadline.after(seconds, now)

    assert deadline.exists
    assert deadline.timeout_at == deadline.at
    for moment in (now, deadline.at, deadline.at + 1):
        assert deadline.passed(moment) == (deadline.left(moment) <= 0)


@given(first=MOMENTS, second=MOMENTS)
def test_the_smaller_of_two_deadlines_is_the_earlier_one(first: float, second: float) -> None:
    assert min(Deadline(first), Deadline(second)).at == min(first, second)
    assert min(Deadline(first), NEVER) == Deadline(first)
