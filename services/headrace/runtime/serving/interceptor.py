"""Intercept every RPC of a server: tracing, metrics, admission, reading of the request, and error statuses.

A call is admitted before its message is read, and the message of a unary request is read here rather than by
gRPC: the handler is registered as a streaming one and reads once. A rejected call therefore costs neither the
memory of its message nor the time to parse it.

Written for grpc.aio's server on OpenTelemetry's API: the contributed instrumentation reports status OK for
streams that were cancelled, timed out or failed, and has no asyncio metrics.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager
from typing import Any, Literal, TypeAlias

import grpc
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.context import Context

from headrace import attributes, errors, statuses
from headrace.propagation import extract
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.serving.fair_semaphore import FairSemaphore, Permit
from headrace.runtime.serving.inflight import InflightBudget
from headrace.runtime.serving.memory_reclaim import Reclaimer
from headrace.runtime.serving.request_message import parser, read_message
from headrace.runtime.serving.servicer_context import StreamingContext

log = logging.getLogger(__name__)

_tracer = trace.get_tracer("headrace.server")
_call_duration = metrics.get_meter("headrace.server").create_histogram(
    attributes.METRIC_SERVER_CALL_DURATION,
    unit="s",
    explicit_bucket_boundaries_advisory=attributes.BUCKETS_CALL,
)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# What is done with the trace context of callers: trust makes their spans the parents of ours, and their
# sampling decides; link starts a new trace with a link to theirs; ignore does not read it.
TraceContext: TypeAlias = Literal["trust", "link", "ignore"]

HEADRACE_METHODS = "/headrace."  # prefix
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

# Calls start in a fair order, and a few at a time. A call is starting from its admission until its first
# response, or until START_SECONDS after its message was read. Hundreds of calls that one caller opens at once
# would otherwise all start in one iteration of the event loop, which delays the next step of everyone else.
# Messages that are not read take 64 KiB of core's memory each at most.
MAX_STARTING = 32
START_SECONDS = 0.1
# Messages of this size and more start one by one: to parse, score and forward one takes milliseconds of the
# event loop.
LONG_BYTES = 128 * 1024
# The message limit of untracked methods: health, reflection, channelz, debug endpoints.
SMALL_BYTES = 64 * 1024


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every RPC: Headrace's own, and health, reflection and channelz, which get no spans.

    untracked       full names of methods that are not requests: they have no spans and do not count as
                    requests in flight
    trace_context   what is done with the trace context of callers
    """

    def __init__(
        self,
        requests: ActiveRequests,
        budget: InflightBudget,
        *,
        untracked: frozenset[str] = frozenset(),
        trace_context: TraceContext = "trust",
    ) -> None:
        self._requests = requests
        self._budget = budget
        self._starting = FairSemaphore(MAX_STARTING)
        self._starting_long = FairSemaphore(1)
        self._reclaimer = Reclaimer()
        self._untracked = untracked
        self._trace_context = trace_context

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the handler of one call; see grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return self._wrap(handler, handler_call_details.method)

    def _wrap(self, handler: _Handler, method: str) -> _Handler:
        behaviour: Any = (
            handler.unary_unary or handler.unary_stream or handler.stream_stream or handler.stream_unary
        )
        parse = parser(handler.request_deserializer)
        headrace = method.startswith(HEADRACE_METHODS)
        untracked = method in self._untracked or not headrace
        around = self._translated if untracked else self._traced
        limit = SMALL_BYTES if untracked else self._budget.limits.max_message_bytes
        # Probes are exempt: if they were rejected under load, the server would be taken for dead.
        exempt = method == HEALTH_CHECK or (untracked and headrace and not handler.request_streaming)

        async def respond(requests: Any, context: Any) -> Any:
            if handler.response_streaming:
                context = StreamingContext(context)
            peer = context.peer()
            try:
                with self._budget.admit(peer, exempt=exempt) as reservation:

                    async def call() -> Any:
                        if handler.request_streaming:
                            return await answer(requests, context)
                        permit = await self._starting.acquire(peer)
                        try:
                            data = await read_message(context, reservation, limit, permit)
                            if len(data) >= LONG_BYTES:
                                permit.release()
                                permit = await self._starting_long.acquire(peer)
                            request = parse(data)
                            asyncio.get_running_loop().call_later(START_SECONDS, permit.release)
                            return await answer(request, context, permit)
                        finally:
                            permit.release()

                    try:
                        return await around(method, context, call)
                    finally:
                        self._reclaimer.released(reservation.size)
            except errors.Busy as error:  # from `admit`: `around` raises none
                await _abort(context, error)

        async def answer(request: Any, context: Any, permit: Permit | None = None) -> Any:
            if not handler.response_streaming:
                return await behaviour(request, context)
            # The wrapper is a coroutine that writes, not a generator: it runs, and is cancelled, as one task,
            # so its context and its cleanup do not depend on the garbage collector.
            responses = behaviour(request, context)
            if inspect.isawaitable(responses):
                await responses
                return None
            async with aclosing(responses) as stream:
                async for response in stream:
                    await context.write(response)
                    if permit is not None:
                        permit.release()
            return None

        kind = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return kind(
            respond,
            request_deserializer=parse if handler.request_streaming else None,
            response_serializer=handler.response_serializer,
        )

    async def _translated(self, method: str, context: Any, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await call()
        except Exception as error:
            if (end := _end_of_call(error)) is not None:
                raise end from None
            await _abort(context, _reported(error, method))

    async def _traced(self, method: str, context: Any, call: Callable[[], Awaitable[Any]]) -> Any:
        name = method.lstrip("/")
        parent, links = _parent(extract(context.invocation_metadata() or ()), self._trace_context)
        began = time.monotonic()
        code = grpc.StatusCode.CANCELLED  # if nothing below sets another one
        with (
            _attached(parent),  # with the caller's baggage
            _tracer.start_as_current_span(
                name,
                kind=trace.SpanKind.SERVER,
                attributes={attributes.RPC_SYSTEM: "grpc", attributes.RPC_METHOD: name},
                links=links,
                record_exception=False,
                set_status_on_exception=False,
            ) as span,
        ):
            try:
                with self._requests.track():
                    result = await call()
                code = grpc.StatusCode.OK
                return result
            except Exception as raised:
                if (end := _end_of_call(raised)) is not None:
                    raise end from None
                error = _reported(raised, name)
                code = error.code
                span.set_attribute(attributes.ERROR_TYPE, error.reason)
                # By the conventions, an error of the caller is not an error of the server's span.
                if code not in _CALLER_ERRORS:
                    span.set_status(trace.StatusCode.ERROR, error.message)
                await _abort(context, error)
            finally:
                left = context.time_remaining()
                if code is grpc.StatusCode.CANCELLED and left is not None and left <= 0:
                    code = grpc.StatusCode.DEADLINE_EXCEEDED
                span.set_attribute(attributes.RPC_STATUS_CODE, code.name)
                _call_duration.record(
                    time.monotonic() - began,
                    {attributes.RPC_METHOD: name, attributes.RPC_STATUS_CODE: code.name},
                )


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


def _end_of_call(error: Exception) -> grpc.aio.BaseError | None:
    """Return gRPC's own error if the caller left during a write or the server stopped; gRPC handles it."""
    inner = errors.unwrap(error)
    if isinstance(inner, grpc.aio.UsageError):  # a bug of ours
        return None
    return inner if isinstance(inner, grpc.aio.BaseError) else None


def _reported(error: Exception, method: str) -> errors.HeadraceError:
    """Return the error that the caller receives; log an unexpected one in full."""
    inner = errors.unwrap(error)
    if isinstance(inner, errors.HeadraceError):
        return inner
    if isinstance(inner, NotImplementedError):  # from generated servicers, for methods without implementation
        return errors.Unimplemented(f"this server does not implement {method.lstrip('/')}")
    log.error("unexpected error", exc_info=error, extra={"method": method})
    return errors.InternalError("internal error; the server's log has the details")


def _drop_frames(error: BaseException | None) -> None:
    """Drop the stack frames of an error: they hold the request, and some hold the error."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


async def _abort(context: Any, error: errors.HeadraceError) -> None:
    status = statuses.to_status(error)
    _drop_frames(error)
    await context.abort(
        error.code,
        status.message,
        trailing_metadata=((statuses.DETAILS_KEY, status.SerializeToString()),),
    )
