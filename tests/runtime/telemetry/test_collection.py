"""Our metrics are data of OpenTelemetry's SDK when they are exported."""

from __future__ import annotations

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics import Counter as SdkCounter
from opentelemetry.sdk.metrics import Histogram as SdkHistogram
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader, MetricsData, Sum
from opentelemetry.sdk.resources import Resource

from headrace.metrics.instruments import Counter, Gauge, Histogram
from headrace.runtime.telemetry import collection
from headrace.runtime.telemetry.collection import Collection, read_by

DELTA, CUMULATIVE = AggregationTemporality.DELTA, AggregationTemporality.CUMULATIVE

Metrics = tuple[Counter, Gauge, Histogram]


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    made = (
        Counter("test.requests", "{request}", ("tier",), "requests", services=()),
        Gauge("test.depth", "{request}", (), "depth", services=()),
        Histogram("test.wait", "s", (), "wait", services=(), bounds=(1, 2)),
    )
    monkeypatch.setattr(collection, "METRICS", made)
    return made


def points(data: MetricsData) -> dict[str, list[tuple[dict[str, object], object]]]:
    """The labels and value of each point; of a histogram, the counts of its buckets and its sum."""
    return {
        metric.name: [
            (dict(point.attributes or {}), getattr(point, "value", None) or _distribution(point))
            for point in metric.data.data_points
        ]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def _distribution(point: object) -> object:
    return (list(getattr(point, "bucket_counts", ())), getattr(point, "sum", 0))


def record(some: Metrics) -> None:
    requests, depth, wait = some
    requests.of(tier="small").add(2)
    depth.of().set(5)
    wait.of().record(1.5)


def test_a_reader_gets_all_metrics_that_have_a_value(some: Metrics) -> None:
    reader = InMemoryMetricReader()
    read_by(reader, Resource({"service.name": "x"}))
    record(some)
    record(some)

    data = reader.get_metrics_data()
    assert data is not None
    assert data.resource_metrics[0].resource.attributes["service.name"] == "x"
    assert points(data) == {
        "test.requests": [({"headrace.tier": "small"}, 4)],
        "test.depth": [({}, 5)],
        "test.wait": [({}, ([0, 2, 0], 3.0))],
    }


def test_an_exporter_that_prefers_differences_gets_them(some: Metrics) -> None:
    collected = Collection(Resource.get_empty(), {SdkCounter: DELTA, SdkHistogram: DELTA})
    record(some)
    first = collected.collect()
    record(some)
    record(some)
    second = collected.collect()

    assert points(first)["test.requests"] == [({"headrace.tier": "small"}, 2)]
    assert points(second) == {
        "test.requests": [({"headrace.tier": "small"}, 4)],
        "test.depth": [({}, 5)],
        "test.wait": [({}, ([0, 2, 0], 3.0))],
    }
    earlier, later = (data.resource_metrics[0].scope_metrics[0].metrics[0].data for data in (first, second))
    assert isinstance(earlier, Sum)
    assert isinstance(later, Sum)
    assert earlier.aggregation_temporality == DELTA
    assert later.data_points[0].start_time_unix_nano == earlier.data_points[0].time_unix_nano


def test_the_data_is_valid_otlp(some: Metrics) -> None:
    record(some)

    message = encode_metrics(Collection(Resource.get_empty(), {}).collect())

    requests, depth, wait = message.resource_metrics[0].scope_metrics[0].metrics
    assert (requests.sum.is_monotonic, requests.sum.data_points[0].as_double) == (True, 2)
    assert depth.gauge.data_points[0].as_double == 5
    (point,) = wait.histogram.data_points
    assert (point.count, list(point.bucket_counts), list(point.explicit_bounds)) == (1, [0, 1, 0], [1, 2])
    assert not point.HasField("min")
