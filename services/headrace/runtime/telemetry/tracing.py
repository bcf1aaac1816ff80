"""Set up tracing: the spans of `spans`, sampled and exported as the standard OTEL_* variables say."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from headrace.runtime.telemetry.otlp_spans import Encoder
from headrace.runtime.telemetry.span_sampler import LinkedRoots
from headrace.runtime.telemetry.spans import ReadableExporter, Tracers


def set_up(
    exporters: Sequence[SpanExporter], resource: Resource, flush_seconds: float
) -> list[Callable[[], object]]:
    """Export spans by all *exporters*; return the functions that close them, within *flush_seconds* each."""
    # The SDK's provider is used for nothing but the sampler of OTEL_TRACES_SAMPLER.
    sampler = LinkedRoots(TracerProvider(resource=resource, shutdown_on_exit=False).sampler)
    limits = SpanLimits()
    encode = Encoder(resource, limits).encode
    processors = [BatchSpanProcessor(_adapted(one, encode, resource, limits)) for one in exporters]
    trace.set_tracer_provider(Tracers(sampler, processors))

    def close(processor: BatchSpanProcessor) -> None:
        processor.force_flush(int(flush_seconds * 1000))
        processor.shutdown()  # type: ignore[no-untyped-call]

    # Separately: an exporter whose collector is down does not delay the last spans of the others.
    return [functools.partial(close, processor) for processor in processors]


def _adapted(
    exporter: SpanExporter, encode: Callable[..., Any], resource: Resource, limits: SpanLimits
) -> SpanExporter:
    """Return an exporter for our spans that sends them as *exporter* does."""
    # The SDK's exporters for OTLP have no parameter for the encoder, but all find it by this name.
    module: Any = sys.modules[type(exporter).__module__]
    if hasattr(module, "encode_spans"):
        module.encode_spans = encode
        return exporter
    return ReadableExporter(exporter, resource, limits)
