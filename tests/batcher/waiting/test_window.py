"""Batches wait for company only as long as it pays, and never for a hungry worker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.waiting.window import HORIZON_SECONDS, Window

WINDOWS = st.builds(
    Window, size=st.integers(1, 64), tokens=st.integers(1, 10_000), linger=st.floats(0, 1, allow_nan=False)
)
RATES = st.floats(0, 1e5, allow_nan=False)


@given(window=WINDOWS, arrivals=RATES, step=st.floats(0, 2))
def test_the_linger_is_bounded_by_the_setting_and_the_step(
    window: Window, arrivals: float, step: float
) -> None:
    linger = window.linger_for(arrivals=arrivals, step_seconds=step)

    assert 0 <= linger <= window.linger
    assert step == 0 or linger <= step


@given(window=WINDOWS, arrivals=RATES, step=st.floats(0, 2))
def test_nobody_waits_for_company_that_is_not_expected(window: Window, arrivals: float, step: float) -> None:
    if arrivals * window.linger < 1:
        assert window.linger_for(arrivals=arrivals, step_seconds=step) == 0


def test_a_linger_ends_when_a_full_batch_may_have_come() -> None:
    window = Window(size=4, linger=1.0)

    assert window.linger_for(arrivals=100, step_seconds=0) == 0.04
    assert window.linger_for(arrivals=2, step_seconds=0) == 1.0
    assert window.linger_for(arrivals=2, step_seconds=0.1) == 0.0, "a step is over before anybody comes"


@given(window=WINDOWS, rate=RATES)
def test_what_waits_at_a_worker_is_bounded_by_its_pace(window: Window, rate: float) -> None:
    budget = window.budget(rate)

    assert 1 <= budget <= window.tokens
    assert rate == 0 or budget <= max(rate * HORIZON_SECONDS, 1)


@given(
    window=WINDOWS,
    waiting=st.integers(1, 100),
    tokens=st.integers(1, 20_000),
    room=st.integers(1, 100),
    oldest=st.floats(0, 1e6),
    linger=st.floats(0, 1),
)
def test_a_batch_closes_at_once_when_full_or_wanted_and_else_after_the_linger(
    window: Window, waiting: int, tokens: int, room: int, oldest: float, linger: float
) -> None:
    def closes(hungry: bool) -> float:
        return window.closes(waiting, tokens, room, oldest=oldest, linger=linger, hungry=hungry)

    assert closes(True) == 0, "a hungry worker is never kept waiting"
    full = waiting >= min(window.size, room) or tokens >= window.tokens
    assert closes(False) == (0 if full else oldest + linger)
