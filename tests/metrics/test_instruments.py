"""What is recorded is what is read, and only with the labels that a metric declares."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.metrics import instruments
from headrace.metrics.instruments import Counter, Gauge, Histogram
from headrace.metrics.words import OTHER


def counter() -> Counter:
    return Counter("test.requests", "{request}", ("tier", "error"), "requests", services=("router",))


def test_each_combination_of_labels_has_a_series_of_its_own() -> None:
    requests = counter()
    requests.of(tier="small", error="").add()
    requests.of(error="SHED", tier="small").add(2)
    requests.of(tier="small", error="").add()

    assert [(labels, series.value) for labels, series in requests] == [
        ({"headrace.tier": "small"}, 2),
        ({"headrace.tier": "small", "error.type": "SHED"}, 2),
    ]


@pytest.mark.parametrize(
    "labels", [{}, {"tier": "a"}, {"tier": "a", "model": "b"}, {"tier": "a", "error": "", "x": ""}]
)
def test_other_labels_than_the_declared_ones_cannot_be_recorded(labels: dict[str, str]) -> None:
    with pytest.raises(TypeError, match=r"test\.requests has the labels tier, error"):
        counter().of(**labels)


def test_the_number_of_series_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "MAX_SERIES", 3)
    requests = counter()
    for number in range(10):
        requests.of(tier=f"tier{number}", error="").add()

    values = {labels["headrace.tier"]: series.value for labels, series in requests}
    assert values == {"tier0": 1, "tier1": 1, "tier2": 1, OTHER: 7}


def test_a_gauge_reads_a_function_while_its_owner_lives() -> None:
    gauge = Gauge("test.depth", "{request}", (), "depth", services=("batcher",))
    waiting = [1, 2, 3]
    with gauge.of().reading(lambda: len(waiting)):
        waiting.append(4)
        assert gauge.of().value == 4

    assert gauge.of().value == 0


def test_a_counter_keeps_what_it_has_read() -> None:
    """The last export comes after the end of what it reads."""
    seconds = Counter("test.time", "s", (), "time", services=("batcher",))
    with seconds.of().reading(lambda: 7.0):
        pass

    assert seconds.of().value == 7


@pytest.mark.parametrize(
    "problem",
    [RuntimeError("dictionary changed size during iteration"), OSError(errno.EMFILE, "too many open files")],
)
def test_a_gauge_keeps_its_value_while_it_cannot_be_read(problem: Exception) -> None:
    gauge = Gauge("test.depth", "{request}", (), "depth", services=("batcher",))
    results = iter([3.0])

    def read() -> float:
        for result in results:
            return result
        raise problem

    with gauge.of().reading(read):
        assert [gauge.of().value, gauge.of().value] == [3, 3]


@given(st.lists(st.floats(min_value=0, max_value=20)), st.lists(st.floats(0.1, 10), min_size=1, unique=True))
def test_each_value_is_in_the_first_bucket_whose_bound_it_does_not_exceed(
    values: list[float], bounds: list[float]
) -> None:
    bounds.sort()
    histogram = Histogram("test.wait", "s", (), "wait", services=("batcher",), bounds=bounds)
    for value in values:
        histogram.of().record(value)

    series = histogram.of()
    assert sum(series.counts) == len(values)
    assert series.total == pytest.approx(sum(values))
    for place, bound in enumerate(bounds):
        assert sum(series.counts[: place + 1]) == sum(value <= bound for value in values)


@pytest.mark.parametrize(
    ("kind", "name", "unit", "expected"),
    [
        (Counter, "headrace.requests", "{request}", "headrace_requests_total"),
        (Counter, "process.cpu.time", "s", "process_cpu_time_seconds_total"),
        (Histogram, "rpc.server.call.duration", "s", "rpc_server_call_duration_seconds"),
        (Histogram, "headrace.batch.fill", "1", "headrace_batch_fill"),
        (Gauge, "headrace.kv.usage", "1", "headrace_kv_usage_ratio"),
        (Gauge, "process.memory.usage", "By", "process_memory_usage_bytes"),
        (Gauge, "headrace.tokens_per_second", "{token}/s", "headrace_tokens_per_second"),
    ],
)
def test_names_are_translated_for_prometheus_as_opentelemetry_does(
    kind: type[Counter], name: str, unit: str, expected: str
) -> None:
    assert kind(name, unit, (), "", services=()).prometheus_name == expected
