"""A worker is suspect when it or its engine is silent, not when it is slow or this process was stalled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.links.liveness import (
    HUNG_SECONDS,
    KNOWN_STEPS,
    LOST_SECONDS,
    SUSPECT_SECONDS,
    UNKNOWN_SECONDS,
    Liveness,
)


def stepping(step: float, count: int = KNOWN_STEPS) -> tuple[Liveness, float]:
    """Return a worker that made *count* steps of *step* seconds, and the time of the last."""
    now, liveness = 0.0, Liveness(0.0)
    for _ in range(count):
        now += step
        liveness.received(now)
        liveness.stepped(now)
    return liveness, now


@given(step=st.floats(0.001, 5))
def test_steps_may_take_five_times_their_99th_percentile_and_at_least_two_seconds(step: float) -> None:
    liveness, last = stepping(step)
    timeout = max(5 * step, SUSPECT_SECONDS)
    for moment, suspect in ((last + 0.99 * timeout, False), (last + 1.01 * timeout, True)):
        liveness.received(moment)
        assert liveness.suspect(moment, running=1) is suspect
        assert liveness.suspect(moment, running=0) is False, "without work there are no steps"


def test_a_step_with_many_prompt_tokens_may_take_twice_what_the_rate_lets_expect() -> None:
    liveness, last = stepping(0.01)
    for moment, suspect in ((last + 9.9, False), (last + 10.1, True)):
        liveness.received(moment)
        assert liveness.suspect(moment, running=1, prompt_seconds=5.0) is suspect
    assert liveness.suspect(last + 2.1, running=1, prompt_seconds=0.9)


def test_a_silent_worker_is_suspect_with_and_without_work() -> None:
    liveness, last = stepping(0.01)

    assert not liveness.suspect(last + SUSPECT_SECONDS - 0.1, running=0)
    assert liveness.suspect(last + SUSPECT_SECONDS, running=0)
    assert liveness.lost(last + LOST_SECONDS, running=0)


def test_an_engine_of_unknown_speed_has_more_time_while_it_answers_pings() -> None:
    liveness = Liveness(0.0)
    liveness.became_busy(0.0)
    liveness.received(UNKNOWN_SECONDS - 0.1)

    assert not liveness.suspect(UNKNOWN_SECONDS - 0.1, running=1)
    liveness.received(UNKNOWN_SECONDS)
    assert liveness.suspect(UNKNOWN_SECONDS, running=1)


def test_a_worker_whose_engine_hangs_is_lost_although_it_answers_pings() -> None:
    liveness, last = stepping(0.01)
    liveness.received(last + HUNG_SECONDS)

    assert "no step" in liveness.lost(last + HUNG_SECONDS, running=1)
    assert not liveness.lost(last + HUNG_SECONDS, running=0)


def test_idle_time_is_no_step() -> None:
    liveness, last = stepping(0.01)
    liveness.became_busy(last + 3600)
    liveness.received(last + 3600)

    assert not liveness.suspect(last + 3601, running=1)
    liveness.stepped(last + 3600.01)
    assert liveness.step_p99 < 0.02


def test_a_stall_of_this_process_does_not_make_the_worker_suspect() -> None:
    liveness, last = stepping(0.01)
    liveness.excuse(60.0)

    assert not liveness.suspect(last + 61, running=1)


def test_a_pong_proves_that_the_worker_was_alive_when_the_ping_was_sent() -> None:
    liveness = Liveness(1.0)
    liveness.pong(0)
    assert liveness.alive_at == 1.0, "the welcome answers the hello"
    pings = {liveness.ping(now): now for now in (2.0, 3.0, 4.0)}
    for nonce in (2, 1, 2, 99):
        liveness.pong(nonce)
        assert liveness.alive_at == pings.get(min(max(nonce, 2), 3)), "the newest ping that was answered"
    assert liveness.pinged_at == 4.0
