"""A worker that keeps failing gets no work, then one probe, and all work when the probe succeeds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.breaker import BreakerState, CircuitBreaker


def opened(now: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    for _ in range(breaker.threshold):
        breaker.record_fault(now)
    return breaker


def test_it_opens_after_faults_in_a_row_and_not_before() -> None:
    breaker = CircuitBreaker(threshold=3)
    breaker.record_fault(0)
    breaker.record_fault(0)
    assert breaker.allowed(0, 8) == 8
    breaker.record_success()
    breaker.record_fault(0)
    breaker.record_fault(0)
    assert breaker.state(0) is BreakerState.CLOSED, "a success in between resets the count"
    breaker.record_fault(0)

    assert breaker.state(0) is BreakerState.OPEN
    assert breaker.allowed(0, 8) == 0


def test_one_probe_is_sent_and_its_success_closes_the_breaker() -> None:
    breaker = opened()
    assert breaker.allowed(1.0, 8) == 1
    breaker.sent()
    assert breaker.allowed(1.0, 8) == 0, "one probe at a time"
    breaker.record_success()

    assert breaker.allowed(1.0, 8) == 8


def test_a_probe_whose_caller_left_allows_another() -> None:
    breaker = opened()
    breaker.sent()
    breaker.release_probe()

    assert breaker.allowed(1.0, 8) == 1


@given(failures=st.integers(1, 12))
def test_each_failed_probe_doubles_the_pause_up_to_the_longest(failures: int) -> None:
    breaker, now, pause = opened(), 0.0, 1.0
    for _ in range(failures):
        now += pause
        assert breaker.state(now - 0.001) is BreakerState.OPEN
        assert breaker.state(now) is BreakerState.HALF_OPEN
        breaker.sent()
        breaker.record_fault(now)
        pause = min(2 * pause, breaker.longest)

    assert breaker.state(now + pause) is BreakerState.HALF_OPEN


def test_faults_of_sequences_sent_before_do_not_prolong_the_pause() -> None:
    breaker = opened(0.0)
    breaker.record_fault(0.9)

    assert breaker.state(1.0) is BreakerState.HALF_OPEN


def test_repeated_faults_of_one_request_count_once() -> None:
    breaker = CircuitBreaker(threshold=2)
    for _ in range(10):
        breaker.record_fault(0, {"a"})
    assert breaker.state(0) is BreakerState.CLOSED

    breaker.record_fault(0, {"b"})
    assert breaker.state(0) is BreakerState.OPEN


def test_a_fault_that_affects_many_requests_counts_once_even_if_repeated() -> None:
    breaker = CircuitBreaker(threshold=2)
    breaker.record_fault(0, {"a", "b", "c"})
    breaker.record_fault(0, {"a", "c"})
    assert breaker.state(0) is BreakerState.CLOSED

    breaker.record_fault(0, {"a", "d"})
    assert breaker.state(0) is BreakerState.OPEN, "the second fault that affected a new request"


def test_after_a_success_the_same_request_may_count_again() -> None:
    breaker = CircuitBreaker(threshold=2)
    breaker.record_fault(0, {"a"})
    breaker.record_success()
    breaker.record_fault(0, {"a"})
    breaker.record_fault(0, {"b"})

    assert breaker.state(0) is BreakerState.OPEN


def test_a_probe_with_a_request_that_failed_before_decides_nothing() -> None:
    breaker = CircuitBreaker(threshold=2)
    breaker.record_fault(0, {"a"})
    breaker.record_fault(0, {"b"})
    breaker.sent()
    breaker.record_fault(1, {"a"})

    assert breaker.state(1) is BreakerState.HALF_OPEN
    assert breaker.allowed(1, 8) == 1, "another probe is allowed"
