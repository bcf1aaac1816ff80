"""Declare the metrics of requests to services outside of the mesh; see `catalogue`."""

from __future__ import annotations

from typing import Final

from headrace import attributes
from headrace.metrics.instruments import (
    Counter,
    CounterSeries,
    Gauge,
    GaugeSeries,
    Histogram,
    HistogramSeries,
    Metric,
)

_UPSTREAM = ("upstream",)

DURATION: Final = Histogram(
    "http.client.request.duration",
    "s",
    ("http_method", "server", "http_status", "error"),
    "time from the start of an HTTP request to an upstream to the end of its response",
    services=_UPSTREAM,
    bounds=attributes.BUCKETS_DURATION,
)
FIRST_BYTE: Final = Histogram(
    "headrace.upstream.time_to_first_byte",
    "s",
    ("tier", "server"),
    "time from the start of an HTTP request to an upstream to the first byte of its response's body",
    services=_UPSTREAM,
    bounds=attributes.BUCKETS_TTFT,
)
RETRIES: Final = Counter(
    "headrace.upstream.retries",
    "{request}",
    ("tier", "error"),
    "requests over HTTP that repeat one that failed before its first token, at any URL, by its error",
    services=_UPSTREAM,
)
URLS: Final = Gauge(
    "headrace.upstream.urls",
    "{url}",
    ("tier", "state"),
    "base URLs: that are used, whose circuit breaker is open, or that failed their last check",
    services=_UPSTREAM,
)
NO_USAGE: Final = Counter(
    "headrace.upstream.usage_missing",
    "{answer}",
    ("tier",),
    "complete answers for which the upstream reported no usage, so that their tokens are estimates",
    services=_UPSTREAM,
)

METRICS: Final[tuple[Metric[CounterSeries] | Metric[GaugeSeries] | Metric[HistogramSeries], ...]] = tuple(
    value for value in globals().values() if isinstance(value, Metric)
)
