"""What every RPC of ours passes on its way in: trace, metrics, admission while draining, error statuses.

Written for grpc.aio's server on OpenTelemetry's API: the contributed instrumentation reports status OK
for streams that were cancelled, timed out or failed, and has no asyncio metrics.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import metrics, propagate, trace

from headrace import attributes, errors
from headrace.runtime.responding import Responding

log = logging.getLogger(__name__)

_tracer = trace.get_tracer("headrace.server")
_call_duration = metrics.get_meter("headrace.server").create_histogram(
    attributes.METRIC_SERVER_CALL_DURATION,
    unit="s",
    explicit_bucket_boundaries_advisory=attributes.BUCKETS_CALL,
)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

OURS = "/headrace."


class _Unreadable:
    """Stands for a request whose bytes could not be parsed, until an answer can be given."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Activity:
    """Knows the requests in flight, and closes the door when the server drains."""

    def __init__(self) -> None:
        self.draining = False
        self.evicting = False
        self._calls: set[asyncio.Task[Any]] = set()

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return len(self._calls)

    def evict(self) -> None:
        """End the requests in flight as DRAINING: their callers carry on elsewhere."""
        self.evicting = True
        for call in self._calls:
            call.cancel()

    @contextmanager
    def call(self) -> Generator[None, None, None]:
        """Count the current task as a request in flight, and let it hear of its eviction.

        Raises Draining at the door, and inside when evicted.
        """
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._calls.add(task)
        try:
            if self.draining:
                raise errors.Draining("this server is stopping; try again", retry_after=0.2)
            yield
        except asyncio.CancelledError:
            if not self.evicting:
                raise
            task.uncancel()
            raise errors.Draining("this server is stopping; carry on elsewhere", retry_after=0.2) from None
        finally:
            self._calls.discard(task)


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the RPCs of our own services; health, reflection and channelz pass untouched.

    untraced   full method names of long-lived streams and looks inside, which are nobody's parent and not
               counted as requests in flight
    """

    def __init__(self, activity: Activity, *, untraced: frozenset[str] = frozenset()) -> None:
        self._activity = activity
        self._untraced = untraced

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the handler of one call; see grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OURS):
            return handler
        if method in self._untraced:
            return self._wrap(handler, method, self._translated)
        return self._wrap(handler, method, self._traced)

    def _wrap(
        self,
        handler: _Handler,
        method: str,
        around: Callable[[str, Any, Callable[[], Awaitable[Any]]], Awaitable[Any]],
    ) -> _Handler:
        behaviour: Any = (
            handler.unary_unary or handler.unary_stream or handler.stream_stream or handler.stream_unary
        )
        if handler.response_streaming:
            # A coroutine that writes, not a generator: it runs, and is cancelled, as one task, so that
            # its context and its clean-up are not left to the garbage collector.
            async def respond(request: Any, context: Any) -> Any:
                context = Responding(context)

                async def call() -> None:
                    responses = behaviour(_readable(request), context)
                    if inspect.isawaitable(responses):
                        await responses
                        return
                    async with aclosing(responses) as stream:
                        async for response in stream:
                            await context.write(response)

                await around(method, context, call)

            kind = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else (grpc.unary_stream_rpc_method_handler)
            )
        else:

            async def respond(request: Any, context: Any) -> Any:
                async def call() -> Any:
                    return await behaviour(_readable(request), context)

                return await around(method, context, call)

            kind = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else (grpc.unary_unary_rpc_method_handler)
            )
        deserialize = handler.request_deserializer
        return kind(
            respond,
            request_deserializer=deserialize if handler.request_streaming else _lenient(deserialize),
            response_serializer=handler.response_serializer,
        )

    async def _translated(self, method: str, context: Any, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await call()
        except Exception as error:
            await _abort(context, _ours(error, method))

    async def _traced(self, method: str, context: Any, call: Callable[[], Awaitable[Any]]) -> Any:
        name = method.lstrip("/")
        carrier = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        began = time.monotonic()
        code = grpc.StatusCode.CANCELLED  # unless it ends some other way
        with _tracer.start_as_current_span(
            name,
            context=propagate.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes={attributes.RPC_SYSTEM: "grpc", attributes.RPC_METHOD: name},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                with self._activity.call():
                    result = await call()
                code = grpc.StatusCode.OK
                return result
            except Exception as raised:
                error = _ours(raised, name)
                code = error.code
                span.set_attribute(attributes.ERROR_TYPE, error.reason)
                # By the conventions a caller's fault is no error of the server's span.
                if code not in _CALLERS_FAULT:
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


_CALLERS_FAULT = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Parse, or say later what could not be parsed: gRPC's own answer is a bare "Unexpected error"."""
    assert deserialize is not None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Unreadable(error)

    return parse


def _readable(request: Any) -> Any:
    if isinstance(request, _Unreadable):
        raise errors.InvalidText(
            "the request cannot be parsed: every text must be valid UTF-8, and the message must be of the "
            f"type that the contract names ({request.error})"
        )
    return request


def _ours(error: Exception, method: str) -> errors.HeadraceError:
    """The error as the caller may see it; anything unexpected goes to the log in full."""
    inner = errors.unwrap(error)
    if isinstance(inner, errors.HeadraceError):
        return inner
    log.error("unexpected error", exc_info=error, extra={"method": method})
    return errors.InternalError("internal error; the server's log has it in full")


async def _abort(context: Any, error: errors.HeadraceError) -> None:
    status = errors.to_status(error)
    await context.abort(
        error.code,
        status.message,
        trailing_metadata=((errors.DETAILS_KEY, status.SerializeToString()),),
    )
