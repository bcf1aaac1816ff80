"""Set up tracing: the spans of `spans`, sampled and exported as the standard OTEL_* variables say."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from headrace.runtime.telemetry.otlp_spans import Encoder
from headrace.runtime.telemetry.span_sampler import LinkedRoots
from headrace.runtime.telemetry.spans import ReadableExporter, Tracers

log = logging.getLogger(__name__)


def set_up(
    exporters: Sequence[SpanExporter], resource: Resource, flush_seconds: float
) -> list[Callable[[], object]]:
    """Export spans by all *exporters*; return the functions that close them, within *flush_seconds* each."""
    # The SDK's provider is used for nothing but the sampler of OTEL_TRACES_SAMPLER.
    sampler = LinkedRoots(TracerProvider(resource=resource, shutdown_on_exit=False).sampler)
    encoder = Encoder(resource, SpanLimits())
    processors = [_processor(one, encoder, resource) for one in exporters]
    trace.set_tracer_provider(Tracers(sampler, processors))

    def close(processor: BatchSpanProcessor) -> None:
        processor.force_flush(int(flush_seconds * 1000))
        processor.shutdown()  # type: ignore[no-untyped-call]

    # Separately: an exporter whose collector is down does not delay the last spans of the others.
    return [functools.partial(close, processor) for processor in processors]


class _Stub:
    """A stub of OTLP's service that sends requests which are serialized already."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.Export: Any = channel.unary_unary(
            "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=ExportTraceServiceResponse.FromString,
        )


class _Processor(BatchSpanProcessor):
    """Queues every span that ends. The SDK's asks each for its context first, to leave out those that are not
    sampled; `spans` records none of them.
    """

    def on_end(self, span: Any) -> None:
        """Queue a span for the exporter's thread."""
        self._batch_processor.emit(span)


def _processor(exporter: SpanExporter, encoder: Encoder, resource: Resource) -> BatchSpanProcessor:
    """Return a processor that sends our spans as *exporter* does."""
    # The SDK's exporters for OTLP have no parameter for the encoder, but all find it by this name.
    module: Any = sys.modules[type(exporter).__module__]
    if hasattr(module, "encode_spans"):
        module.encode_spans = encoder.request
        if hasattr(exporter, "_stub"):  # of gRPC
            sender: Any = exporter
            sender._stub = _Stub
            sender._client = _Stub(sender._channel)
        return _Processor(exporter)
    return _Processor(ReadableExporter(exporter, resource))
