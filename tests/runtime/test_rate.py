"""A rate counts the events of its window."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.rate import RateMeter


@given(events=st.lists(st.tuples(st.floats(0.001, 2), st.integers(1, 50)), min_size=1, max_size=60))
def test_the_rate_is_what_happened_in_the_window(events: list[tuple[float, int]]) -> None:
    meter, now = RateMeter(window=5.0), 100.0
    happened = []
    for pause, count in events:
        now += pause
        meter.add(now, count)
        happened.append((now, count))

    # Events within 50 ms are one entry, so the edge of the window has that precision.
    least = sum(count for at, count in happened if at > now - 4.9)
    most = sum(count for at, count in happened if at > now - 5.1)
    assert least / 5 - 1e-9 <= meter.per_second(now) <= most / 0.5 + 1e-9
    assert meter.per_second(now + 10) == 0
