"""Encode the spans of `spans` for OTLP, for the SDK's exporters.

The encoder joins the bytes of the fields of opentelemetry/proto/trace/v1/trace.proto. Most are the same in
many spans, and encoded once. That takes a fifteenth of the time of the SDK's encoder.

Spans are encoded on the exporter's thread, many in a row: on the event loop, where each is encoded by itself
when it ends, it takes longer, because the processor's caches hold other code.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits
from opentelemetry.trace import DEFAULT_TRACE_STATE, SpanContext, SpanKind, StatusCode

from headrace.runtime.telemetry.spans import UNSET, Span

_KINDS = {
    SpanKind.INTERNAL: trace_pb2.Span.SPAN_KIND_INTERNAL,
    SpanKind.SERVER: trace_pb2.Span.SPAN_KIND_SERVER,
    SpanKind.CLIENT: trace_pb2.Span.SPAN_KIND_CLIENT,
    SpanKind.PRODUCER: trace_pb2.Span.SPAN_KIND_PRODUCER,
    SpanKind.CONSUMER: trace_pb2.Span.SPAN_KIND_CONSUMER,
}
_MAX_UINT64 = 2**64 - 1
_CACHED_CHARACTERS = 64  # of a value; longer ones would fill the memory
_VARINT, _FIXED64, _BYTES = 0, 1, 2  # wire types
_fixed64 = struct.Struct("<Q").pack
_double = struct.Struct("<d").pack

# The encoder holds the interpreter's lock, and requests wait for it. It pauses after so many spans: they take
# half a millisecond, a whole batch takes four.
_SPANS_IN_A_ROW = 64
_PAUSE_SECONDS = 0.0005

log = logging.getLogger(__name__)


@lru_cache(maxsize=4096)
def _varint(number: int) -> bytes:
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*parts, number))


def _tag(name: str, wire_type: int, message: Any = trace_pb2.Span) -> bytes:
    return _varint(message.DESCRIPTOR.fields_by_name[name].number << 3 | wire_type)


def _flags(message: Any) -> dict[bool, bytes]:
    """Return the flags of a span or link as bytes, by whether its parent or the linked span is remote."""
    known = trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
    remote = known | trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
    return {False: message(flags=known).SerializeToString(), True: message(flags=remote).SerializeToString()}


_RESOURCE_SPANS = _tag("resource_spans", _BYTES, ExportTraceServiceRequest)
_SPANS = _tag("spans", _BYTES, trace_pb2.ScopeSpans)
_SCOPE_SPANS = _tag("scope_spans", _BYTES, trace_pb2.ResourceSpans)
# The fields of ids have the same numbers in spans and links.
_TRACE_ID, _SPAN_ID = _tag("trace_id", _BYTES) + b"\x10", _tag("span_id", _BYTES) + b"\x08"
_PARENT_ID = _tag("parent_span_id", _BYTES) + b"\x08"
_START, _END = _tag("start_time_unix_nano", _FIXED64), _tag("end_time_unix_nano", _FIXED64)
_EVENT_TIME = _tag("time_unix_nano", _FIXED64, trace_pb2.Span.Event)
_EVENTS, _LINKS = _tag("events", _BYTES), _tag("links", _BYTES)
_ATTRIBUTES = _tag("attributes", _BYTES)
_EVENT_ATTRIBUTES = _tag("attributes", _BYTES, trace_pb2.Span.Event)
_LINK_ATTRIBUTES = _tag("attributes", _BYTES, trace_pb2.Span.Link)
_VALUE = _tag("value", _BYTES, KeyValue)
_STRING, _INT = _tag("string_value", _BYTES, AnyValue), _tag("int_value", _VARINT, AnyValue)
_DOUBLE, _ARRAY = _tag("double_value", _FIXED64, AnyValue), _tag("array_value", _BYTES, AnyValue)
_ARRAY_VALUES = _tag("values", _BYTES, ArrayValue)
_BOOLS = {value: AnyValue(bool_value=value).SerializeToString() for value in (False, True)}
_FLAGS, _LINK_FLAGS = _flags(trace_pb2.Span), _flags(trace_pb2.Span.Link)


class Request:
    """An ExportTraceServiceRequest that is serialized already, with the methods that exporters call."""

    def __init__(self, serialized: bytes) -> None:
        self._serialized = serialized

    def SerializeToString(self) -> bytes:
        """Return the serialized message."""
        return self._serialized

    SerializePartialToString = SerializeToString


class Encoder:
    """Encodes spans of one resource, within the SDK's limits."""

    def __init__(self, resource: Resource, limits: SpanLimits) -> None:
        # The SDK encodes the resource, once: a request without spans would have none.
        empty = ReadableSpan("", context=SpanContext(1, 1, False), resource=resource)
        (block,) = encode_spans([empty]).resource_spans
        del block.scope_spans[:]
        self._resource = block.SerializeToString()
        self._limits = limits

    def request(self, spans: Sequence[Any]) -> Request | ExportTraceServiceRequest:
        """Return an export request with *spans*."""
        if spans and not isinstance(spans[0], Span):  # of the SDK, from an exporter that converted them
            return encode_spans(spans)
        scopes: dict[Any, list[bytes]] = {}
        for number, span in enumerate(spans, start=1):
            if number % _SPANS_IN_A_ROW == 0:
                time.sleep(_PAUSE_SECONDS)
            try:
                body = self._span(span)
            except Exception as error:  # an attribute of a type that OTLP lacks must not lose the others
                log.error("span cannot be exported", extra={"span": span.name, "error": type(error).__name__})
                continue
            parts = scopes.get(span.scope)
            if parts is None:
                parts = scopes[span.scope] = [_scope(span.scope)]
            parts += (_SPANS, _varint(len(body)), body)
        blocks = [self._resource]
        for parts in scopes.values():
            body = b"".join(parts)
            blocks += (_SCOPE_SPANS, _varint(len(body)), body)
        body = b"".join(blocks)
        return Request(b"".join((_RESOURCE_SPANS, _varint(len(body)), body)))

    def _span(self, span: Span) -> bytes:
        limits, parent, state, status = self._limits, span.above, span.trace_state, span.status
        parts = [
            *(_TRACE_ID, span.trace_id.to_bytes(16, "big"), _SPAN_ID, span.span_id.to_bytes(8, "big")),
            _name_and_kind(span.name, span.kind._value_),  # the kind itself takes long to hash
            *(_START, _fixed64(span.start_time), _END, _fixed64(span.end_time or span.start_time)),
        ]
        if parent is None:
            parts.append(_FLAGS[False])
        else:
            parts += (_FLAGS[parent.is_remote], _PARENT_ID, parent.span_id.to_bytes(8, "big"))
        dropped = self._add(parts, _ATTRIBUTES, span.attributes, limits.max_span_attributes)
        dropped_events = self._add_events(parts, span) if span.events else 0
        dropped_links = self._add_links(parts, span) if span.links else 0
        dropped_any = dropped or dropped_events or dropped_links
        if dropped_any or state is not DEFAULT_TRACE_STATE or status is not UNSET:
            # What few spans have, as a message of its own: messages are merged by joining their bytes.
            rest = trace_pb2.Span(
                trace_state=state.to_header(),
                dropped_attributes_count=dropped,
                dropped_events_count=dropped_events,
                dropped_links_count=dropped_links,
            )
            if status.status_code is not StatusCode.UNSET:
                rest.status.code = status.status_code.value
                rest.status.message = status.description or ""
            parts.append(rest.SerializeToString())
        return b"".join(parts)

    def _add_events(self, parts: list[bytes], span: Span) -> int:
        """Add the last events within the limit; return the number of others. So do the methods below."""
        events, dropped = _last(span.events, self._limits.max_events)
        for event in events:
            made = [_EVENT_TIME, _fixed64(event.timestamp), _event_name(event.name)]
            if event.attributes:
                most = self._limits.max_event_attributes
                if left := self._add(made, _EVENT_ATTRIBUTES, event.attributes, most):
                    made.append(trace_pb2.Span.Event(dropped_attributes_count=left).SerializeToString())
            body = b"".join(made)
            parts += (_EVENTS, _varint(len(body)), body)
        return dropped

    def _add_links(self, parts: list[bytes], span: Span) -> int:
        links, dropped = _last(span.links, self._limits.max_links)
        for link in links:
            to = link.context
            made = [
                *(_TRACE_ID, to.trace_id.to_bytes(16, "big"), _SPAN_ID, to.span_id.to_bytes(8, "big")),
                _LINK_FLAGS[to.is_remote],
            ]
            if link.attributes:
                most = self._limits.max_link_attributes
                if left := self._add(made, _LINK_ATTRIBUTES, link.attributes, most):
                    made.append(trace_pb2.Span.Link(dropped_attributes_count=left).SerializeToString())
            body = b"".join(made)
            parts += (_LINKS, _varint(len(body)), body)
        return dropped

    def _add(self, parts: list[bytes], tag: bytes, attributes: Mapping[str, Any], most: int | None) -> int:
        pairs: Any = attributes.items()
        dropped = 0
        if most is not None and len(attributes) > most:
            pairs, dropped = _last(list(pairs), most)
        longest = self._limits.max_span_attribute_length
        for key, value in pairs:
            if longest is not None:
                value = _shortened(value, longest)
            kind = type(value)
            if kind is int or kind is bool or (kind is str and len(value) <= _CACHED_CHARACTERS):
                parts.append(_attribute(tag, key, value))
            else:
                parts.append(_new_attribute(tag, key, value))
        return dropped


@lru_cache(maxsize=256)
def _name_and_kind(name: str, kind: int) -> bytes:
    return trace_pb2.Span(name=name, kind=_KINDS[SpanKind(kind)]).SerializeToString()


@lru_cache(maxsize=256)
def _event_name(name: str) -> bytes:
    return trace_pb2.Span.Event(name=name).SerializeToString()


def _new_attribute(tag: bytes, key: str, value: Any) -> bytes:
    made = _value(value)
    body = b"".join((_key(key), _VALUE, _varint(len(made)), made))
    return b"".join((tag, _varint(len(body)), body))


@lru_cache(maxsize=256)
def _key(key: str) -> bytes:
    return KeyValue(key=key).SerializeToString()


def _value(value: Any) -> bytes:
    """Return an AnyValue."""
    kind = type(value)
    if kind is str:
        text = value.encode(errors="replace")
        return b"".join((_STRING, _varint(len(text)), text))
    if kind is bool:
        return _BOOLS[value]
    if kind is int:
        return _INT + _varint(value & _MAX_UINT64)
    if kind is float:
        return _DOUBLE + _double(value)
    if kind is list or kind is tuple:
        parts: list[bytes] = []
        for each in value:
            made = _value(each)
            parts += (_ARRAY_VALUES, _varint(len(made)), made)
        body = b"".join(parts)
        return b"".join((_ARRAY, _varint(len(body)), body))
    message = AnyValue()
    _set(message, value)
    return message.SerializeToString()


# Typed, since 1 and True are equal.
_attribute = lru_cache(maxsize=4096, typed=True)(_new_attribute)


def _scope(scope: Any) -> bytes:
    made = trace_pb2.ScopeSpans(schema_url=scope.schema_url)
    made.scope.name, made.scope.version = scope.name, scope.version or ""
    return made.SerializeToString()


def _last(items: Sequence[Any], most: int | None) -> tuple[Sequence[Any], int]:
    """Return the last items, at most *most*, and the number of others."""
    if most is None or len(items) <= most:
        return items, 0
    return items[len(items) - most :], len(items) - most


def _set(message: AnyValue, value: Any) -> None:
    match value:
        case str():
            message.string_value = value
        case bool():
            message.bool_value = value
        case int():
            message.int_value = value
        case float():
            message.double_value = value
        case bytes():
            message.bytes_value = value
        case None:
            pass
        case Mapping():
            for key, each in value.items():
                pair = message.kvlist_value.values.add()
                pair.key = str(key)
                _set(pair.value, each)
        case Sequence():
            message.array_value.SetInParent()
            for each in value:
                _set(message.array_value.values.add(), each)
        case _:
            message.string_value = str(value)


def _shortened(value: Any, longest: int) -> Any:
    if isinstance(value, str):
        return value[:longest]
    if isinstance(value, (list, tuple)):
        return [_shortened(each, longest) for each in value]
    return value
