from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.sequences import relative_priority, span_context

PRIORITIES = st.lists(st.integers(0, 9), max_size=40)


def effective(priority: int, others: list[int]) -> float:
    return relative_priority(priority, len(others), sum(others))


@given(priority=st.integers(0, 2**32 - 1), others=PRIORITIES)
def test_an_effective_priority_is_in_range(priority: int, others: list[int]) -> None:
    assert 0 <= effective(priority, others) <= 9


@given(others=PRIORITIES, low=st.integers(0, 9), high=st.integers(0, 9))
def test_urgent_sequences_of_a_stream_stay_ahead_of_its_others(
    others: list[int], low: int, high: int
) -> None:
    low, high = sorted((low, high))

    assert effective(low, others) <= effective(high, others)


def test_a_stream_on_which_everything_is_urgent_gains_nothing() -> None:
    assert effective(9, [9] * 30) == 5
    assert effective(10**9, [9] * 30) == 5
    assert effective(9, [3] * 30) == 9, "it goes ahead of the stream's others"
    assert effective(2, [2] * 30) == 2, "low priorities are not raised"


def test_a_malformed_or_overlong_trace_is_ignored() -> None:
    good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert span_context(wire.TraceContext(traceparent=good)).is_valid
    for trace in (
        wire.TraceContext(),
        wire.TraceContext(traceparent="x" * 10_000_000),
        wire.TraceContext(traceparent=good, tracestate="a=b," * 10_000),
    ):
        assert not span_context(trace).is_valid
