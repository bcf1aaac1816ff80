"""Calls and bytes in flight stay within the limits, and everything is released."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.runtime.serving.inflight import InflightBudget
from headrace.runtime.serving.limits import MIB, Limits

LIMITS = Limits(max_message_bytes=4 * MIB, max_inflight_bytes=16 * MIB, max_calls=16)


def test_a_connection_takes_half_a_host_three_quarters_and_others_still_fit() -> None:
    budget = InflightBudget(LIMITS)
    with ExitStack() as held:
        for _ in range(8):
            held.enter_context(budget.admit("ipv4:10.0.0.1:1"))
        with pytest.raises(errors.Busy, match="this connection"), budget.admit("ipv4:10.0.0.1:1"):
            pass
        for _ in range(4):
            held.enter_context(budget.admit("ipv4:10.0.0.1:2"))
        with pytest.raises(errors.Busy, match="this host"), budget.admit("ipv4:10.0.0.1:3"):
            pass
        for _ in range(4):
            held.enter_context(budget.admit("ipv6:%5B::1%5D:9"))
        with pytest.raises(errors.Busy, match="all callers") as caught, budget.admit("ipv4:10.0.0.2:1"):
            pass
        assert caught.value.retry_after

        with budget.admit("ipv4:10.0.0.2:1", exempt=True):
            assert budget.calls == 16
    assert budget.calls == 0


def test_bytes_beyond_the_limit_are_rejected_and_change_nothing() -> None:
    budget = InflightBudget(LIMITS)
    with budget.admit("unix:/socket") as hold:
        hold.resize(15 * MIB)
        with pytest.raises(errors.Busy):
            hold.resize(17 * MIB)
        assert budget.bytes == 15 * MIB
        hold.resize(1 * MIB)
        assert budget.bytes == 1 * MIB
    assert budget.bytes == 0


peers = st.sampled_from([f"ipv4:10.0.0.{host}:{port}" for host in range(3) for port in range(3)] + ["unix:"])


@given(st.lists(st.tuples(peers, st.integers(0, 6 * MIB), st.booleans()), max_size=60))
def test_nothing_is_held_beyond_the_limits_and_nothing_is_left(
    calls: list[tuple[str, int, bool]],
) -> None:
    budget = InflightBudget(LIMITS)
    running: list[ExitStack] = []
    for peer, size, ends in calls:
        call = ExitStack()
        try:
            call.enter_context(budget.admit(peer)).resize(size)
            running.append(call)
        except errors.Busy:
            call.close()
        assert budget.calls == len(running) <= LIMITS.max_calls
        assert budget.bytes <= LIMITS.max_inflight_bytes
        if ends and running:
            running.pop(0).close()
    for call in running:
        call.close()

    assert (budget.calls, budget.bytes) == (0, 0)
    assert not budget._calls
    assert not budget._bytes
