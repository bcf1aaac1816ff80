"""A worker that keeps failing gets no work, then a probe, and all of it when the probe came back well."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.links.breaker import Breaker, State


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(breaker.threshold):
        breaker.fail(now)
    return breaker


def test_it_opens_after_faults_in_a_row_and_not_before() -> None:
    breaker = Breaker(threshold=3)
    breaker.fail(0)
    breaker.fail(0)
    assert breaker.room(0, 8) == 8
    breaker.succeed()
    breaker.fail(0)
    breaker.fail(0)
    assert breaker.state(0) is State.CLOSED, "a success between starts the count again"
    breaker.fail(0)

    assert breaker.state(0) is State.OPEN
    assert breaker.room(0, 8) == 0


def test_one_probe_goes_and_its_success_closes_it() -> None:
    breaker = opened()
    assert breaker.room(1.0, 8) == 1
    breaker.sent()
    assert breaker.room(1.0, 8) == 0, "one probe at a time"
    breaker.succeed()

    assert breaker.room(1.0, 8) == 8


def test_a_probe_whose_caller_left_says_nothing() -> None:
    breaker = opened()
    breaker.sent()
    breaker.forgive()

    assert breaker.room(1.0, 8) == 1


@given(failures=st.integers(1, 12))
def test_each_failed_probe_doubles_the_pause_up_to_the_longest(failures: int) -> None:
    breaker, now, pause = opened(), 0.0, 1.0
    for _ in range(failures):
        now += pause
        assert breaker.state(now - 0.001) is State.OPEN
        assert breaker.state(now) is State.HALF_OPEN
        breaker.sent()
        breaker.fail(now)
        pause = min(2 * pause, breaker.longest)

    assert breaker.state(now + pause) is State.HALF_OPEN


def test_faults_of_what_was_sent_before_do_not_prolong_the_pause() -> None:
    breaker = opened(0.0)
    breaker.fail(0.9)

    assert breaker.state(1.0) is State.HALF_OPEN


def test_faults_of_one_request_count_once_however_often_it_comes_back() -> None:
    breaker = Breaker(threshold=2)
    for _ in range(10):
        breaker.fail(0, {"a"})
    assert breaker.state(0) is State.CLOSED

    breaker.fail(0, {"b"})
    assert breaker.state(0) is State.OPEN


def test_a_fault_that_hits_many_requests_counts_once_and_so_does_its_repetition() -> None:
    breaker = Breaker(threshold=2)
    breaker.fail(0, {"a", "b", "c"})
    breaker.fail(0, {"a", "c"})
    assert breaker.state(0) is State.CLOSED

    breaker.fail(0, {"a", "d"})
    assert breaker.state(0) is State.OPEN, "the second fault that hit somebody new"


def test_after_a_success_the_same_request_may_count_again() -> None:
    breaker = Breaker(threshold=2)
    breaker.fail(0, {"a"})
    breaker.succeed()
    breaker.fail(0, {"a"})
    breaker.fail(0, {"b"})

    assert breaker.state(0) is State.OPEN


def test_a_probe_that_fails_of_a_request_that_failed_before_is_no_verdict() -> None:
    breaker = Breaker(threshold=2)
    breaker.fail(0, {"a"})
    breaker.fail(0, {"b"})
    breaker.sent()
    breaker.fail(1, {"a"})

    assert breaker.state(1) is State.HALF_OPEN
    assert breaker.room(1, 8) == 1, "another one may be the probe"
