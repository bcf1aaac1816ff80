"""A stream is read as fast as it sends work, and up to a fixed rate otherwise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.flow.allowance import BURST_SECONDS, OTHER_SECONDS, WORK_SECONDS, Allowance

KINDS = st.sampled_from(["submit", "cancel", "ack", "ping", "quiesce", None])


@given(kinds=st.lists(KINDS, max_size=400), start=st.floats(0, 1e6))
def test_a_stream_that_sends_without_end_is_read_at_the_fixed_rate(
    kinds: list[str | None], start: float
) -> None:
    allowance, now, cost = Allowance(start), start, 0.0
    for kind in kinds:
        now += allowance.wait(kind, now)
        cost += WORK_SECONDS if kind in ("submit", "cancel", "ack") else OTHER_SECONDS

    assert now - start >= cost - BURST_SECONDS - 1e-6
    assert now - start <= max(cost - BURST_SECONDS, 0.0) + 1e-6


def test_a_busy_batcher_that_pings_each_second_never_waits() -> None:
    allowance = Allowance(0.0)
    waits = []
    for second in range(100):
        waits.append(allowance.wait("ping", second))
        waits += [allowance.wait("ack", second + number / 1000) for number in range(1000)]
        waits += [allowance.wait("submit", second + 0.999) for _ in range(500)]

    assert max(waits) == 0.0


def test_pings_without_end_are_read_fifty_a_second() -> None:
    allowance, now = Allowance(0.0), 0.0
    read = 0
    while now < 10.0:
        now += allowance.wait("ping", now)
        read += 1

    assert 540 <= read <= 560
