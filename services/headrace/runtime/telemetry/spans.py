"""Record spans by OpenTelemetry's API, with the SDK's sampler and processors, at a fifth of the SDK's cost.

The SDK's own spans cost more CPU time than anything else that telemetry does: 31 us to record one, and 27 us
to encode it. A request has eight. These cost 7 us and 4 us; see `benchmarks.telemetry`. Everything else is
the SDK's: sampler, limits, resource, batching, and the transport of the exporters, configured by the same
variables. `otlp_spans` encodes spans for OTLP; other exporters get the SDK's `ReadableSpan`, without limits.

Unlike the SDK's, these spans do not check the types of attributes when they are set, and record an exception
by its class alone: its message may contain text of a prompt. A span below one that is not sampled is the same
one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from random import getrandbits
from typing import Any, NamedTuple

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import Attributes

_RANDOM = TraceFlags.RANDOM_TRACE_ID
_SAMPLED_FLAGS = {random: TraceFlags(TraceFlags.SAMPLED | (_RANDOM * random)) for random in (False, True)}
_OTHER_FLAGS = {random: TraceFlags(_RANDOM * random) for random in (False, True)}
UNSET = Status(StatusCode.UNSET)
_NO_ATTRIBUTES: Mapping[str, Any] = {}

# The description of a sampler that decides on roots only, as all `parentbased_*` samplers of the SDK.
_FOLLOWS_PARENTS = re.compile(
    r".*remoteParentSampled:AlwaysOnSampler,remoteParentNotSampled:AlwaysOffSampler,"
    r"localParentSampled:AlwaysOnSampler,localParentNotSampled:AlwaysOffSampler\}+"
)


class SpanEvent(NamedTuple):
    """An event of a span; *timestamp* in nanoseconds since 1970."""

    name: str
    timestamp: int
    attributes: Mapping[str, Any]


class Span(trace.Span):
    """A span that is recorded. Other threads may read it once it has ended.

    Methods: see `opentelemetry.trace.Span`. Times are in nanoseconds since 1970. The span above is one of
    this process, or the context that a caller sent; None for a root.
    """

    is_remote = False  # as a parent

    __slots__ = (
        "_context",
        "_processors",
        "above",
        "attributes",
        "end_time",
        "events",
        "kind",
        "links",
        "name",
        "scope",
        "span_id",
        "start_time",
        "status",
        "trace_flags",
        "trace_id",
        "trace_state",
    )

    def __init__(
        self,
        name: str,
        trace_id: int,
        above: Span | SpanContext | None,
        trace_flags: TraceFlags,
        trace_state: TraceState,
        kind: SpanKind,
        attributes: Attributes,
        links: Sequence[Link] | None,
        start_time: int | None,
        scope: InstrumentationScope,
        processors: Sequence[SpanProcessor],
    ) -> None:
        self.name = name
        self.trace_id = trace_id
        self.span_id = getrandbits(64) or 1
        self.trace_flags = trace_flags
        self.trace_state = trace_state
        self._context: SpanContext | None = None
        self.above = above
        self.kind = kind
        self.attributes: dict[str, Any] = dict(attributes) if attributes else {}
        self.events: list[SpanEvent] = []
        self.links = list(links) if links else []
        self.start_time = time.time_ns() if start_time is None else start_time
        self.end_time: int | None = None
        self.status = UNSET
        self.scope = scope
        self._processors = processors

    def end(self, end_time: int | None = None) -> None:
        """End the span, and hand it over to be exported."""
        if self.end_time is None:
            self.end_time = time.time_ns() if end_time is None else end_time
            for processor in self._processors:
                processor.on_end(self)  # type: ignore[arg-type] # it reads `context` only

    def get_span_context(self) -> SpanContext:
        """Return the ids of the span."""
        if self._context is None:  # most spans have no children, and none is made
            self._context = SpanContext(
                self.trace_id, self.span_id, False, self.trace_flags, self.trace_state
            )
        return self._context

    @property
    def context(self) -> SpanContext:
        """The ids of the span."""
        return self.get_span_context()

    @property
    def parent(self) -> SpanContext | None:
        """The ids of the span above."""
        return self.above.context if isinstance(self.above, Span) else self.above

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes."""
        if self.end_time is None:
            self.attributes.update(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Set one attribute."""
        if self.end_time is None:
            self.attributes[key] = value

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """Add an event, by default with the current time."""
        if self.end_time is None:
            at = time.time_ns() if timestamp is None else timestamp
            self.events.append(SpanEvent(name, at, attributes or _NO_ATTRIBUTES))

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        """Link to another span."""
        if self.end_time is None:
            self.links.append(Link(context, attributes))

    def update_name(self, name: str) -> None:
        """Replace the name."""
        if self.end_time is None:
            self.name = name

    def is_recording(self) -> bool:
        """Whether the span has not ended."""
        return self.end_time is None

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Set the status. As the specification requires, UNSET is ignored and OK is final."""
        made = status if isinstance(status, Status) else Status(status, description)
        if self.end_time is None and not (made.is_unset or self.status.status_code is StatusCode.OK):
            self.status = made

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Add an event for an exception, with its class only."""
        kind = type(exception)
        self.add_event(
            "exception",
            {"exception.type": f"{kind.__module__}.{kind.__qualname__}", **(attributes or {})},
            timestamp,
        )


class Tracer(trace.Tracer):
    """Starts spans of one instrumentation scope; see `opentelemetry.trace.Tracer`."""

    def __init__(
        self, sampler: Sampler, processors: Sequence[SpanProcessor], scope: InstrumentationScope
    ) -> None:
        self._sampler = sampler
        self._follows_parents = _FOLLOWS_PARENTS.fullmatch(sampler.get_description()) is not None
        self._processors = processors
        self._scope = scope

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> trace.Span:
        """Start a span; one that is not sampled records nothing."""
        above = trace.get_current_span(context)
        if type(above) is Span and self._follows_parents:  # nothing to decide
            return Span(
                name,
                above.trace_id,
                above,
                above.trace_flags,
                above.trace_state,
                kind,
                attributes,
                links,
                start_time,
                self._scope,
                self._processors,
            )
        parent: SpanContext | None = above.get_span_context()
        if parent is not None and parent.is_valid:
            if self._follows_parents and not parent.trace_flags.sampled and not above.is_recording():
                return above  # nobody will see either, so it needs no ids of its own
            trace_id, random = parent.trace_id, parent.trace_flags.random_trace_id
        else:
            parent, trace_id, random = None, getrandbits(128) or 1, True
        if parent is not None and self._follows_parents:
            sampled, state = True, parent.trace_state
        else:
            result = self._sampler.should_sample(context, trace_id, name, kind, attributes, links)
            sampled = result.decision is Decision.RECORD_AND_SAMPLE
            state, attributes = result.trace_state or trace.DEFAULT_TRACE_STATE, result.attributes
        flags = (_SAMPLED_FLAGS if sampled else _OTHER_FLAGS)[random]
        if not sampled:
            own = SpanContext(trace_id, getrandbits(64) or 1, False, flags, state)
            return trace.NonRecordingSpan(own)
        return Span(
            name,
            trace_id,
            parent,
            flags,
            state,
            kind,
            attributes,
            links,
            start_time,
            self._scope,
            self._processors,
        )

    @contextmanager
    def start_as_current_span(  # type: ignore[override] # the API's also decorates functions
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
        end_on_exit: bool = True,
    ) -> Generator[trace.Span, None, None]:
        """Start a span that is the current one while the block runs."""
        span = self.start_span(name, context, kind, attributes, links, start_time)
        token = otel_context.attach(trace.set_span_in_context(span))
        try:
            yield span
        except Exception as error:
            if record_exception:
                span.record_exception(error)
            if set_status_on_exception:
                span.set_status(StatusCode.ERROR, type(error).__qualname__)
            raise
        finally:
            otel_context.detach(token)
            if end_on_exit:
                span.end()


class Tracers(trace.TracerProvider):
    """Makes the tracers of a process; its *processors* get each span that ends."""

    def __init__(self, sampler: Sampler, processors: Sequence[SpanProcessor]) -> None:
        self._sampler = sampler
        self._processors = tuple(processors)

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> trace.Tracer:
        """Return a tracer of this scope."""
        scope = InstrumentationScope(
            instrumenting_module_name, instrumenting_library_version, schema_url, attributes
        )
        return Tracer(self._sampler, self._processors, scope)


class ReadableExporter(SpanExporter):
    """Exports spans by an exporter that expects the SDK's, such as the console's."""

    def __init__(self, inner: SpanExporter, resource: Resource) -> None:
        self._inner = inner
        self._resource = resource

    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        """Export spans of this module."""
        return self._inner.export([self._readable(span) for span in spans])

    def shutdown(self) -> None:
        """Shut the exporter down."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Flush the exporter."""
        return self._inner.force_flush(timeout_millis)

    def _readable(self, span: Span) -> ReadableSpan:
        return ReadableSpan(
            name=span.name,
            context=span.context,
            parent=span.parent,
            resource=self._resource,
            attributes=span.attributes,
            events=[Event(event.name, event.attributes, event.timestamp) for event in span.events],
            links=span.links,
            kind=span.kind,
            status=span.status,
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.scope,
        )
