"""Record the calls of a client: a span and the duration of each."""

from __future__ import annotations

import time
from collections.abc import Mapping

import grpc
from opentelemetry import metrics, trace
from opentelemetry.context import Context

from headrace import attributes, errors, statuses
from headrace.channel import server_address
from headrace.metrics.catalogue import CLIENT_CALL_DURATION

_tracer = trace.get_tracer("headrace.client")
# For applications that use this library and export metrics; Headrace's own processes export the catalogue.
_call_duration = metrics.get_meter("headrace.client").create_histogram(
    CLIENT_CALL_DURATION.name,
    unit=CLIENT_CALL_DURATION.unit,
    explicit_bucket_boundaries_advisory=CLIENT_CALL_DURATION.bounds,
)

_EMPTY: Mapping[str, str | int] = {}


class Attempts:
    """The attempts of one request. Without a caller's span they are one trace: the first one's.

    context   with the span of the first attempt; None if there is none, or the caller has a span
    """

    def __init__(self) -> None:
        self.context: Context | None = None

    def begin(self, first: trace.Span) -> None:
        """Make *first* the parent of the next attempts, unless the caller has a span."""
        own = first.get_span_context()
        if own.is_valid and not trace.get_current_span().get_span_context().is_valid:
            self.context = trace.set_span_in_context(trace.NonRecordingSpan(own))


class ClientSpan:
    """The span of one call, which also records the call in the metrics.

    context     with the span, to be sent with the call
    recording   whether the span is recorded
    """

    def __init__(
        self,
        method: str,
        server: Mapping[str, str | int],
        labels: Mapping[str, str | int] = _EMPTY,
        attempts: Attempts | None = None,
    ) -> None:
        """Start the span.

        method     its full name, such as "headrace.v1.GenerationService/Generate"
        server     of `server_attributes`
        labels     further attributes of the span
        attempts   those made for the same request
        """
        parent = attempts.context if attempts is not None else None
        self._span = _tracer.start_span(method, parent, trace.SpanKind.CLIENT, server)
        self.context = trace.set_span_in_context(self._span, parent)
        self.recording = self._span.is_recording()
        if self.recording:
            self._span.set_attribute(attributes.RPC_METHOD, method)
            self._span.set_attributes(labels)
        if attempts is not None and parent is None:
            attempts.begin(self._span)
        self._method = method
        self._began = time.monotonic()
        # Unless `succeed` or `fail` is called, the caller has left.
        self._code, self._error_type, self._message = grpc.StatusCode.CANCELLED, "CANCELLED", ""

    def add_event(self, name: str) -> None:
        """Add an event to the span."""
        self._span.add_event(name)

    def succeed(self) -> None:
        """Note that the call succeeded."""
        self._code, self._error_type = grpc.StatusCode.OK, ""

    def fail(self, error: Exception) -> None:
        """Note the error of the call."""
        if isinstance(error, errors.HeadraceError):
            self._code, self._error_type = error.code, error.reason
            # Messages about the caller's mistakes may quote the request.
            self._message = error.message if error.code in statuses.SERVER_ERRORS else ""
        else:
            self._code, self._error_type = grpc.StatusCode.UNKNOWN, type(error).__qualname__

    def end(self) -> None:
        """End the span and record the call."""
        span, kind = self._span, self._error_type
        _record(self._method, self._code.name, kind, time.monotonic() - self._began)
        if self.recording:
            span.set_attribute(attributes.RPC_STATUS_CODE, self._code.name)
            if kind:  # by the RPC conventions, every status but OK is an error of a client's span
                span.set_attribute(attributes.ERROR_TYPE, kind)
                span.set_status(trace.StatusCode.ERROR, self._message or None)
        span.end()


def _record(method: str, status: str, error: str, seconds: float) -> None:
    CLIENT_CALL_DURATION.of(rpc_system="grpc", method=method, status=status, error=error).record(seconds)
    labels = {
        attributes.RPC_SYSTEM: "grpc",
        attributes.RPC_METHOD: method,
        attributes.RPC_STATUS_CODE: status,
    }
    _call_duration.record(seconds, {**labels, attributes.ERROR_TYPE: error} if error else labels)


def server_attributes(target: str) -> dict[str, str | int]:
    """Return the attributes of all calls to a target; a list of addresses stays one."""
    made: dict[str, str | int] = {attributes.RPC_SYSTEM: "grpc"}
    if (address := server_address(target)) is not None:
        made[attributes.SERVER_ADDRESS], made[attributes.SERVER_PORT] = address
    elif target:
        made[attributes.SERVER_ADDRESS] = target
    return made
