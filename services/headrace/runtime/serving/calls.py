"""Run the calls of a server: tracing, metrics, draining, and the error that ends a call.

A call is one request of a caller, whether it is an RPC of its own (`interceptor`) or one of many requests on
a stream. Both are run by `Calls.run`.

Written on OpenTelemetry's API: the contributed instrumentation reports status OK for streams that were
cancelled, timed out or failed, and has no asyncio metrics.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Literal, TypeAlias

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from headrace import attributes, errors, statuses
from headrace.metrics import catalogue
from headrace.propagation import extract
from headrace.runtime.security.guard import Guard, OpenGuard
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.serving.inflight import InflightBudget
from headrace.runtime.serving.limits import Limits

log = logging.getLogger(__name__)

_tracer = trace.get_tracer("headrace.server")

# What is done with the trace context of callers: trust makes their spans the parents of ours, and their
# sampling decides; link starts a new trace with a link to theirs; ignore does not read it.
TraceContext: TypeAlias = Literal["trust", "link", "ignore"]
Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]

_LIMITS = Limits()


class Calls:
    """The calls of one server, and what they share.

    requests        those in flight
    budget          limits calls and bytes in flight
    guard           decides which are accepted; by default all
    trace_context   what is done with the trace context of callers
    address         host and port of the server, for spans
    """

    def __init__(
        self,
        limits: Limits = _LIMITS,
        *,
        trace_context: TraceContext = "trust",
        guard: Guard | None = None,
    ) -> None:
        self.requests = ActiveRequests()
        self.budget = InflightBudget(limits)
        self.address: tuple[str, int] | None = None
        self.guard = guard or OpenGuard()
        self._trace_context = trace_context
        self._attributes: dict[str, dict[str, str | int]] = {}  # of spans, by method

    async def run(
        self,
        method: str,
        metadata: Metadata,
        time_remaining: Callable[[], float | None],
        call: Callable[[], Awaitable[object]],
        *,
        status: Callable[[], grpc.StatusCode | None] = lambda: None,
    ) -> errors.HeadraceError | None:
        """Run *call* as a request in flight, in a server span. Returns the error to end it with, if any.

        method           its full name, such as "headrace.v1.GenerationService/Generate"
        time_remaining   returns the seconds until the caller's deadline; None if there is none
        status           returns the status that the call has set itself; None if it has set none

        Raises gRPC's own errors if the caller has left or the call has ended itself, and CancelledError.
        """
        began = time.monotonic()
        parent, links = parent_of(extract(metadata), self._trace_context)
        span = _tracer.start_span(method, parent, trace.SpanKind.SERVER, self._attributes_of(method), links)
        # With the caller's baggage. Attached by hand: a context manager would add to the cost of each call.
        token = otel_context.attach(trace.set_span_in_context(span, parent))
        code, reason, message = grpc.StatusCode.CANCELLED, "", ""  # if nothing below sets another one
        in_flight = catalogue.CALLS_IN_FLIGHT.of()
        in_flight.add(1)
        try:
            with self.requests.track():
                await call()
            code = status() or grpc.StatusCode.OK
            return None
        except Exception as raised:
            if (end := end_of_call(raised)) is not None:
                code = status() or code
                raise end from None
            error = reported(raised, method)
            code, reason, message = error.code, error.reason, error.message
            return error
        finally:
            left = time_remaining()
            if code is grpc.StatusCode.CANCELLED and left is not None and left <= 0:
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            kind = error_type(code, reason)
            in_flight.add(-1)
            catalogue.SERVER_CALL_DURATION.of(
                rpc_system="grpc", method=method, status=code.name, error=kind
            ).record(time.monotonic() - began)
            if span.is_recording():
                span.set_attribute(attributes.RPC_STATUS_CODE, code.name)
                if kind:
                    span.set_attribute(attributes.ERROR_TYPE, kind)
                if code in statuses.SERVER_ERRORS:
                    span.set_status(trace.StatusCode.ERROR, message or None)
            otel_context.detach(token)
            span.end()

    def _attributes_of(self, method: str) -> dict[str, str | int]:
        made = self._attributes.get(method)
        if made is None:
            made = self._attributes[method] = {attributes.RPC_SYSTEM: "grpc", attributes.RPC_METHOD: method}
            if self.address is not None:
                host, port = self.address
                made |= {attributes.SERVER_ADDRESS: host, attributes.SERVER_PORT: port}
        return made


def error_type(code: grpc.StatusCode, reason: str) -> str:
    """Return the `error.type` of a call: the reason of its error, or its status; empty if it succeeded."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return reason or errors.DeadlineExceeded.reason  # gRPC cancels the call before we raise that
    return "" if code is grpc.StatusCode.OK else reason or code.name


def end_of_call(error: Exception) -> grpc.aio.BaseError | None:
    """Return gRPC's own error, which gRPC handles: the caller left during a write, the server stopped, or the
    call was aborted.
    """
    inner = errors.unwrap(error)
    if isinstance(inner, grpc.aio.UsageError):  # a bug of ours
        return None
    return inner if isinstance(inner, grpc.aio.BaseError) else None


def reported(error: Exception, method: str) -> errors.HeadraceError:
    """Return the error that the caller receives; log an unexpected one in full."""
    inner = errors.unwrap(error)
    if isinstance(inner, errors.HeadraceError):
        return inner
    if isinstance(inner, NotImplementedError):  # from generated servicers, for methods without implementation
        return errors.Unimplemented(f"this server does not implement {method.lstrip('/')}")
    log.error("unexpected error", exc_info=error, extra={"method": method})
    return errors.InternalError("internal error; the server's log has the details")


def drop_frames(error: BaseException | None) -> None:
    """Drop the stack frames of an error: they hold the request, and some hold the error."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def parent_of(received: Context, policy: TraceContext) -> tuple[Context, list[trace.Link]]:
    """Return the context in which a request's span starts, and its links.

    received   the context that the caller sent
    """
    if policy == "trust":
        return received, []
    caller = trace.get_current_span(received).get_span_context()
    return Context(), [trace.Link(caller)] if policy == "link" and caller.is_valid else []
