"""A worker is suspect when it is silent, or when its engine is; not when it is only slow, or we were."""

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
    """A worker that made *count* steps of *step* seconds, and the time of the last."""
    now, liveness = 0.0, Liveness(0.0)
    for _ in range(count):
        now += step
        liveness.heard(now)
        liveness.stepped(now)
    return liveness, now


@given(step=st.floats(0.001, 5))
def test_steps_may_take_five_times_their_99th_percentile_and_at_least_two_seconds(step: float) -> None:
    liveness, last = stepping(step)
    patience = max(5 * step, SUSPECT_SECONDS)
    for moment, suspect in ((last + 0.99 * patience, False), (last + 1.01 * patience, True)):
        liveness.heard(moment)
        assert liveness.suspect(moment, running=1) is suspect
        assert liveness.suspect(moment, running=0) is False, "without work there are no steps to make"


def test_silence_makes_suspect_whether_there_is_work_or_not() -> None:
    liveness, last = stepping(0.01)

    assert not liveness.suspect(last + SUSPECT_SECONDS - 0.1, running=0)
    assert liveness.suspect(last + SUSPECT_SECONDS, running=0)
    assert liveness.lost(last + LOST_SECONDS, running=0)


def test_an_engine_that_is_not_known_yet_has_longer_while_it_answers() -> None:
    liveness = Liveness(0.0)
    liveness.busy(0.0)
    liveness.heard(UNKNOWN_SECONDS - 0.1)

    assert not liveness.suspect(UNKNOWN_SECONDS - 0.1, running=1)
    liveness.heard(UNKNOWN_SECONDS)
    assert liveness.suspect(UNKNOWN_SECONDS, running=1)


def test_an_engine_that_hangs_for_long_is_given_up_though_it_answers() -> None:
    liveness, last = stepping(0.01)
    liveness.heard(last + HUNG_SECONDS)

    assert "no step" in liveness.lost(last + HUNG_SECONDS, running=1)
    assert not liveness.lost(last + HUNG_SECONDS, running=0)


def test_time_without_work_is_no_step() -> None:
    liveness, last = stepping(0.01)
    liveness.busy(last + 3600)
    liveness.heard(last + 3600)

    assert not liveness.suspect(last + 3601, running=1)
    liveness.stepped(last + 3600.01)
    assert liveness.p99 < 0.02


def test_our_own_standstill_is_no_fault_of_the_worker() -> None:
    liveness, last = stepping(0.01)
    liveness.excuse(60.0)

    assert not liveness.suspect(last + 61, running=1)


def test_an_answer_proves_life_at_the_time_of_the_question() -> None:
    liveness = Liveness(1.0)
    liveness.pong(0)
    assert liveness.answered_at == 1.0, "the welcome answers the hello"
    asked = {liveness.ping(now): now for now in (2.0, 3.0, 4.0)}
    for nonce in (2, 1, 2, 99):
        liveness.pong(nonce)
        assert liveness.answered_at == asked.get(min(max(nonce, 2), 3)), "the newest that was answered"
    assert liveness.pinged_at == 4.0
