"""A batch waits for more requests only as long as it pays, and not while a worker is idle."""

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
def test_a_batch_does_not_wait_if_no_request_is_expected(
    window: Window, arrivals: float, step: float
) -> None:
    if arrivals * window.linger < 1:
        assert window.linger_for(arrivals=arrivals, step_seconds=step) == 0


def test_a_linger_ends_when_a_full_batch_is_expected() -> None:
    window = Window(size=4, linger=1.0)

    assert window.linger_for(arrivals=100, step_seconds=0) == 0.04
    assert window.linger_for(arrivals=2, step_seconds=0) == 1.0
    assert window.linger_for(arrivals=2, step_seconds=0.1) == 0.0, (
        "the step ends before the next request is expected"
    )


@given(window=WINDOWS, rate=RATES, step=st.integers(0, 10_000))
def test_the_backlog_at_a_worker_is_bounded_by_its_prefill_rate_and_its_steps(
    window: Window, rate: float, step: int
) -> None:
    budget = window.budget(rate, step)

    assert 1 <= budget <= window.tokens
    assert rate == 0 or budget <= max(rate * HORIZON_SECONDS, 3 * step, 1)


@given(window=WINDOWS, rate=RATES, step=st.integers(1, 10_000))
def test_prompts_for_three_steps_wait_at_the_worker(window: Window, rate: float, step: int) -> None:
    assert window.budget(rate, step) >= min(3 * step, window.tokens)


@given(
    window=WINDOWS,
    waiting=st.integers(1, 100),
    tokens=st.integers(1, 20_000),
    free_slots=st.integers(1, 100),
    idle=st.booleans(),
)
def test_a_batch_is_complete_if_it_is_full_or_if_a_worker_is_idle(
    window: Window, waiting: int, tokens: int, free_slots: int, idle: bool
) -> None:
    full = waiting >= min(window.size, free_slots) or tokens >= window.tokens

    assert window.is_complete(waiting, tokens, free_slots, idle=idle) == (idle or full)
