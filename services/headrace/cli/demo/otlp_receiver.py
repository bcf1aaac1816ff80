"""Receive spans over OTLP, for the demo and for tests."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence


@dataclass(frozen=True)
class Event:
    """An event of a span; its time is in nanoseconds since 1970."""

    name: str
    at: int


@dataclass(frozen=True)
class Span:
    """An exported span. Ids are hexadecimal; times are in nanoseconds since 1970."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str  # empty for a root
    kind: str  # "internal", "server", "client"...
    start: int
    end: int
    attributes: Mapping[str, Any]
    events: Sequence[Event]
    links: Sequence[str]  # ids of linked spans
    failed: bool


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Stores the spans that it receives; created by `otlp_receiver`."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Span] = []
        self._received = asyncio.Condition()

    @property
    def environment(self) -> dict[str, str]:
        """The environment with which a process exports all its spans here, shortly after they end."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": self.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_TRACES_SAMPLER": "always_on",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OTEL_SDK_DISABLED": "false",
            "OTEL_SERVICE_NAME": "",
        }

    async def Export(  # noqa: N802
        self, request: pb.ExportTraceServiceRequest, context: object
    ) -> pb.ExportTraceServiceResponse:
        async with self._received:
            self.spans += spans_of(request)
            self._received.notify_all()
        return pb.ExportTraceServiceResponse()

    async def wait_for(self, condition: Callable[[Sequence[Span]], bool], timeout: float) -> None:
        """Wait until *condition* is true for the received spans. Raises TimeoutError."""
        async with asyncio.timeout(timeout), self._received:
            await self._received.wait_for(lambda: condition(self.spans))


@asynccontextmanager
async def otlp_receiver() -> AsyncGenerator[Receiver, None]:
    """Listen on a free local port while the block runs."""
    receiver, server = Receiver(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(None)


def spans_of(request: pb.ExportTraceServiceRequest) -> list[Span]:
    """Return the spans of an export request."""
    return [
        Span(
            service=_attributes(block.resource).get("service.name", ""),
            name=span.name,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            kind=span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
            start=span.start_time_unix_nano,
            end=span.end_time_unix_nano,
            attributes=_attributes(span),
            events=[Event(event.name, event.time_unix_nano) for event in span.events],
            links=[link.span_id.hex() for link in span.links],
            failed=span.status.code == 2,  # STATUS_CODE_ERROR
        )
        for block in request.resource_spans
        for scope in block.scope_spans
        for span in scope.spans
    ]


def _attributes(holder: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in holder.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def is_complete(spans: Sequence[Span], trace_id: str) -> bool:
    """Return whether the trace has its root, and the parent of every span."""
    ours = [span for span in spans if span.trace_id == trace_id]
    ids = {span.span_id for span in ours}
    return any(not span.parent_id for span in ours) and all(
        not span.parent_id or span.parent_id in ids for span in ours
    )
