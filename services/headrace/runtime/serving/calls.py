"""Run the calls of a server: tracing, metrics, draining, and the error that ends a call.

A call is one request of a caller, whether it is an RPC of its own (`interceptor`) or one of many requests on
a stream. Both are run by `Calls.run`.

Written on OpenTelemetry's API: the contributed instrumentation reports status OK for streams that were
cancelled, timed out or failed, and has no asyncio metrics.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Literal, TypeAlias

import grpc
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.context import Context

from headrace import attributes, errors
from headrace.propagation import extract
from headrace.runtime.security.guard import Guard, OpenGuard
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.serving.inflight import InflightBudget
from headrace.runtime.serving.limits import Limits

log = logging.getLogger(__name__)

_tracer = trace.get_tracer("headrace.server")
_call_duration = metrics.get_meter("headrace.server").create_histogram(
    attributes.METRIC_SERVER_CALL_DURATION,
    unit="s",
    explicit_bucket_boundaries_advisory=attributes.BUCKETS_CALL,
)

# What is done with the trace context of callers: trust makes their spans the parents of ours, and their
# sampling decides; link starts a new trace with a link to theirs; ignore does not read it.
TraceContext: TypeAlias = Literal["trust", "link", "ignore"]
Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]

_LIMITS = Limits()
_CALLER_ERRORS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)


class Calls:
    """The calls of one server, and what they share.

    requests        those in flight
    budget          limits calls and bytes in flight
    guard           decides which are accepted; by default all
    trace_context   what is done with the trace context of callers
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
        self.guard = guard or OpenGuard()
        self._trace_context = trace_context

    async def run(
        self,
        method: str,
        metadata: Metadata,
        time_remaining: Callable[[], float | None],
        call: Callable[[], Awaitable[object]],
    ) -> errors.HeadraceError | None:
        """Run *call* as a request in flight, in a server span. Returns the error to end it with, if any.

        method           its full name, such as "headrace.v1.GenerationService/Generate"
        time_remaining   returns the seconds until the caller's deadline; None if there is none

        Raises gRPC's own errors if the caller has left, and CancelledError.
        """
        began = time.monotonic()
        code = grpc.StatusCode.CANCELLED  # if nothing below sets another one
        parent, links = _parent(extract(metadata), self._trace_context)
        with (
            _attached(parent),  # with the caller's baggage
            _tracer.start_as_current_span(
                method,
                kind=trace.SpanKind.SERVER,
                attributes={attributes.RPC_SYSTEM: "grpc", attributes.RPC_METHOD: method},
                links=links,
                record_exception=False,
                set_status_on_exception=False,
            ) as span,
        ):
            try:
                with self.requests.track():
                    await call()
                code = grpc.StatusCode.OK
                return None
            except Exception as raised:
                if (end := end_of_call(raised)) is not None:
                    raise end from None
                error = reported(raised, method)
                code = error.code
                span.set_attribute(attributes.ERROR_TYPE, error.reason)
                # By the conventions, an error of the caller is not an error of the server's span.
                if code not in _CALLER_ERRORS:
                    span.set_status(trace.StatusCode.ERROR, error.message)
                return error
            finally:
                left = time_remaining()
                if code is grpc.StatusCode.CANCELLED and left is not None and left <= 0:
                    code = grpc.StatusCode.DEADLINE_EXCEEDED
                span.set_attribute(attributes.RPC_STATUS_CODE, code.name)
                _call_duration.record(
                    time.monotonic() - began,
                    {attributes.RPC_METHOD: method, attributes.RPC_STATUS_CODE: code.name},
                )


def end_of_call(error: Exception) -> grpc.aio.BaseError | None:
    """Return gRPC's own error if the caller left during a write or the server stopped; gRPC handles it."""
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


def _parent(received: Context, policy: TraceContext) -> tuple[Context, list[trace.Link]]:
    """Return the context in which a request's span starts, and its links."""
    if policy == "trust":
        return received, []
    caller = trace.get_current_span(received).get_span_context()
    return Context(), [trace.Link(caller)] if policy == "link" and caller.is_valid else []


@contextmanager
def _attached(context: Context) -> Generator[None, None, None]:
    token = otel_context.attach(context)
    try:
        yield
    finally:
        otel_context.detach(token)
