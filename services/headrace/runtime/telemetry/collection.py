"""Read the metrics of this process as data of OpenTelemetry's SDK, for its readers and exporters.

The SDK's own instruments take ten times as long to record as ours (`headrace.metrics.instruments`), so only
its readers are used. Import this module only where metrics are exported: it loads the SDK.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from opentelemetry.sdk.metrics import Counter as SdkCounter
from opentelemetry.sdk.metrics import Histogram as SdkHistogram
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricReader,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from headrace.metrics import instruments as ours
from headrace.metrics.catalogue import METRICS

_SCOPE = InstrumentationScope("headrace")


def read_by(reader: MetricReader, resource: Resource, *, preferences: Any = None) -> MetricReader:
    """Make *reader* collect the metrics of this process. Returns it.

    preferences   the temporality of kinds of instruments that its exporter prefers, as in
                  MetricExporter; cumulative by default
    """
    collection = Collection(resource, preferences or {})
    reader._set_collect_callback(lambda *_, **__: collection.collect())
    return reader


class Collection:
    """The metrics of this process for one exporter."""

    def __init__(self, resource: Resource, preferences: dict[type, AggregationTemporality]) -> None:
        cumulative = AggregationTemporality.CUMULATIVE
        self._resource = resource
        self._temporality = {
            "counter": preferences.get(SdkCounter, cumulative),
            "histogram": preferences.get(SdkHistogram, cumulative),
        }
        # For exporters that prefer differences: what each series had at the last collection, and when.
        self._before: dict[object, tuple[int, list[float]]] = {}

    def collect(self) -> MetricsData:
        """Return all metrics that have a value."""
        now = time.time_ns()
        made = [metric for one in METRICS if (metric := self._metric(one, now)).data.data_points]
        scope = ScopeMetrics(_SCOPE, made, schema_url="")
        return MetricsData([ResourceMetrics(self._resource, [scope], schema_url="")])

    def _metric(self, metric: ours.Metric[Any], now: int) -> Metric:
        data: Sum | Gauge | Histogram
        match metric:
            case ours.Histogram():
                data = Histogram(self._distributions(metric, now), self._temporality["histogram"])
            case ours.Counter():
                temporality = self._temporality["counter"]
                data = Sum(self._sums(metric, now), temporality, is_monotonic=True)
            case _:
                data = Gauge(
                    [NumberDataPoint(labels, 0, now, float(series.value)) for labels, series in metric]
                )
        return Metric(metric.name, metric.description, metric.unit, data)

    def _sums(self, metric: ours.Counter, now: int) -> list[NumberDataPoint]:
        points = []
        for labels, series in metric:
            since, (value,) = self._since("counter", series, metric.since, now, [float(series.value)])
            points.append(NumberDataPoint(labels, since, now, value))
        return points

    def _distributions(self, metric: ours.Histogram, now: int) -> list[HistogramDataPoint]:
        points = []
        for labels, series in metric:
            read = [series.total, *series.counts]
            since, (total, *counts) = self._since("histogram", series, metric.since, now, read)
            number = [int(count) for count in counts]
            points.append(
                HistogramDataPoint(
                    labels,
                    since,
                    now,
                    sum(number),
                    total,
                    number,
                    metric.bounds,
                    min=None,  # type: ignore[arg-type]  # optional in OTLP, and not recorded
                    max=None,  # type: ignore[arg-type]
                )
            )
        return points

    def _since(
        self, kind: str, series: object, began: int, now: int, values: Iterable[float]
    ) -> tuple[int, list[float]]:
        """Return from when on values are counted, and their values since then."""
        read = list(values)
        if self._temporality[kind] is AggregationTemporality.CUMULATIVE:
            return began, read
        since, before = self._before.get(series, (began, [0.0] * len(read)))
        self._before[series] = now, read
        return since, [value - earlier for value, earlier in zip(read, before, strict=True)]
