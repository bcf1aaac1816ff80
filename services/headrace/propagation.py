"""Propagate trace context and baggage in gRPC metadata, with the propagators of OTEL_PROPAGATORS.

Between batcher and worker the trace context is always in W3C format, in message fields: see
`headrace.v1.TraceContext`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from importlib.metadata import entry_points
from typing import Any

from opentelemetry import baggage, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter, TextMapPropagator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace import errors

_KEY = re.compile(r"(?!grpc-)[a-z0-9._-]+")
_VALUE = re.compile(r"[ -~]*")

# The usual traceparent is parsed and written here: OpenTelemetry's propagators take four times as long.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")

_FLAGS = [trace.TraceFlags(flags) for flags in range(256)]
_w3c = TraceContextTextMapPropagator()


class _Headers(Getter[Mapping[str, str]]):
    """Reads headers by lower-case keys: propagators use capitals, gRPC metadata does not."""

    def get(self, carrier: Mapping[str, str], key: str) -> list[str] | None:
        value = carrier.get(key.lower())
        return None if value is None else [value]

    def keys(self, carrier: Mapping[str, str]) -> list[str]:
        return list(carrier)


_HEADERS = _Headers()


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise InvalidRequest for headers that gRPC cannot send."""
    for key, value in headers.items():
        if not (_KEY.fullmatch(key) and not key.endswith("-bin") and _VALUE.fullmatch(value)):
            raise errors.InvalidRequest(
                f"metadata {key!r} cannot be sent: keys consist of a-z, 0-9, '-', '_' and '.', without the "
                "prefix grpc- or the suffix -bin, and values are printable ASCII"
            )


def inject(context: Context | None = None, headers: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Return metadata with *headers* and the propagated *context*, by default the current one."""
    textmap = _api().get_global_textmap()
    if _is_standard(textmap) and not baggage.get_all(context):
        made = list(headers.items()) if headers else []
        traceparent, tracestate = to_w3c(trace.get_current_span(context))
        made += [("traceparent", traceparent)] if traceparent else ()
        made += [("tracestate", tracestate)] if tracestate else ()
        return made
    carrier = dict(headers or {})
    textmap.inject(carrier, context=context)
    return [(key.lower(), value) for key, value in carrier.items()]


def extract(metadata: Iterable[tuple[str, str | bytes]]) -> Context:
    """Return the context that a caller sent."""
    textmap = _api().get_global_textmap()
    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    if _is_standard(textmap) and "tracestate" not in carrier and "baggage" not in carrier:
        if (traceparent := carrier.get("traceparent")) is None:
            return Context()
        if (match := _TRACEPARENT.fullmatch(traceparent)) is not None:
            return trace.set_span_in_context(trace.NonRecordingSpan(_parsed(match)), Context())
    context: Context = textmap.extract(carrier, getter=_HEADERS)
    return context


@cache
def _api() -> Any:
    # Imported late: the import raises if OTEL_PROPAGATORS names one that is not installed; see `problem`.
    from opentelemetry import propagate

    return propagate


@lru_cache(maxsize=2)
def _is_standard(textmap: TextMapPropagator) -> bool:
    """Return whether the propagators are W3C's for trace context and baggage, which is the default."""
    return textmap.fields == {"traceparent", "tracestate", "baggage"}


def problem() -> str:
    """Return what is wrong with OTEL_PROPAGATORS, as a message; empty if it is valid.

    OpenTelemetry raises on import if a propagator is not installed, so processes check it at their start.
    """
    names = [name.strip() for name in os.environ.get("OTEL_PROPAGATORS", "").split(",") if name.strip()]
    installed = {point.name for point in entry_points(group="opentelemetry_propagator")}
    missing = [name for name in names if name not in installed]
    if not missing or "none" in map(str.lower, names):
        return ""
    return (
        f"OTEL_PROPAGATORS: {', '.join(missing)} not installed; available: {', '.join(sorted(installed))}, "
        "none; others are in packages named opentelemetry-propagator-..."
    )


def to_w3c(span: trace.Span) -> tuple[str, str]:
    """Return traceparent and tracestate of a span; empty if it is invalid."""
    context = span.get_span_context()
    if not context.is_valid:
        return "", ""
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return parent, context.trace_state.to_header() if context.trace_state else ""


def from_w3c(traceparent: str, tracestate: str) -> trace.SpanContext:
    """Return the span context of traceparent and tracestate; invalid if they are."""
    if not tracestate and (match := _TRACEPARENT.fullmatch(traceparent)) is not None:
        return _parsed(match)
    context = _w3c.extract({"traceparent": traceparent, "tracestate": tracestate})
    return trace.get_current_span(context).get_span_context()


def _parsed(match: re.Match[str]) -> trace.SpanContext:
    trace_id, span_id, flags = match.groups()
    return trace.SpanContext(int(trace_id, 16), int(span_id, 16), True, _FLAGS[int(flags, 16)])
