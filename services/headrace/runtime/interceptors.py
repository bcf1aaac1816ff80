"""What every RPC passes on its way in: trace, metrics, admission, the reading of its message, error statuses.

A call is admitted before its message is read, and the message of a unary request is read here rather than by
gRPC: one read, by a handler that gRPC takes for a streaming one. What is refused then costs neither the
message's memory nor a parse.

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
from typing import Any, Literal, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.context import Context

from headrace import attributes, errors, statuses
from headrace.propagation import extract
from headrace.runtime.budget import Budget, Hold
from headrace.runtime.memory import Reclaim
from headrace.runtime.responding import Responding
from headrace.runtime.turns import LONG_BYTES, Turn, Turns

log = logging.getLogger(__name__)

_tracer = trace.get_tracer("headrace.server")
_call_duration = metrics.get_meter("headrace.server").create_histogram(
    attributes.METRIC_SERVER_CALL_DURATION,
    unit="s",
    explicit_bucket_boundaries_advisory=attributes.BUCKETS_CALL,
)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

OURS = "/headrace."
# Of callers: their spans are parents of ours, and their sampling decides; or are linked to; or are not read.
TraceContext: TypeAlias = Literal["trust", "link", "ignore"]
CHECK = "/grpc.health.v1.Health/Check"

# A message that has not arrived after so many pauses of the event loop is charged as the longest one until it
# is there. Pauses, not seconds: a loop that is late itself has not made its callers slow.
PROMPT_PAUSES, PAUSE_SECONDS = 5, 0.02
# A call whose message has not arrived after so long is refused.
READ_SECONDS = 30.0
# A call that has been read is starting until its first response, or for so long.
START_SECONDS = 0.1
# Of a request that asks for no tokens: health, reflection, channelz, tiers, insides.
SMALL_BYTES = 64 * 1024


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
    """Wraps every RPC: those of our own services, and health, reflection and channelz, without spans.

    untraced   full method names of long-lived streams and looks inside, which are nobody's parent and not
               counted as requests in flight
    callers    what becomes of the trace context of callers
    """

    def __init__(
        self,
        activity: Activity,
        budget: Budget,
        *,
        untraced: frozenset[str] = frozenset(),
        callers: TraceContext = "trust",
    ) -> None:
        self._activity = activity
        self._budget = budget
        self._turns = Turns()
        self._long_turns = Turns(1)
        self._reclaim = Reclaim()
        self._untraced = untraced
        self._callers = callers

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
        parse = _parser(handler.request_deserializer)
        aside = method in self._untraced or not method.startswith(OURS)
        around = self._translated if aside else self._traced
        limit = SMALL_BYTES if aside else self._budget.limits.message_bytes
        # Probes are answered under load, too, or it would be taken for death.
        exempt = (aside and method.startswith(OURS) and not handler.request_streaming) or method == CHECK

        async def respond(requests: Any, context: Any) -> Any:
            if handler.response_streaming:
                context = Responding(context)
            peer = context.peer()
            try:
                with self._budget.call(peer, exempt=exempt) as hold:

                    async def call() -> Any:
                        if handler.request_streaming:
                            return await answer(requests, context)
                        turn = await self._turns.take(peer)
                        try:
                            data = await _message(context, hold, limit, turn)
                            if len(data) >= LONG_BYTES:
                                turn.end()
                                turn = await self._long_turns.take(peer)
                            request = parse(data)
                            asyncio.get_running_loop().call_later(START_SECONDS, turn.end)
                            return await answer(request, context, turn)
                        finally:
                            turn.end()

                    async def answer(request: Any, context: Any, turn: Turn | None = None) -> Any:
                        if not handler.response_streaming:
                            return await behaviour(request, context)
                        # A coroutine that writes, not a generator: it runs, and is cancelled, as one task,
                        # so that its context and its clean-up are not left to the garbage collector.
                        responses = behaviour(request, context)
                        if inspect.isawaitable(responses):
                            await responses
                            return None
                        async with aclosing(responses) as stream:
                            async for response in stream:
                                await context.write(response)
                                if turn is not None:
                                    turn.end()
                        return None

                    try:
                        return await around(method, context, call)
                    finally:
                        self._reclaim.released(hold.size)
            except errors.Busy as error:  # at the door: nothing else leaves `around`
                await _abort(context, error)

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
            await _abort(context, _ours(error, method))

    async def _traced(self, method: str, context: Any, call: Callable[[], Awaitable[Any]]) -> Any:
        name = method.lstrip("/")
        parent, links = _parent(extract(context.invocation_metadata() or ()), self._callers)
        began = time.monotonic()
        code = grpc.StatusCode.CANCELLED  # unless it ends some other way
        with (
            _attached(parent),  # the caller's baggage with it
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
                with self._activity.call():
                    result = await call()
                code = grpc.StatusCode.OK
                return result
            except Exception as raised:
                if (end := _end_of_call(raised)) is not None:
                    raise end from None
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


def _parent(sent: Context, callers: TraceContext) -> tuple[Context, list[trace.Link]]:
    """The context that a request's span begins in, and its links, by what is done with the caller's."""
    if callers == "trust":
        return sent, []
    theirs = trace.get_current_span(sent).get_span_context()
    return Context(), [trace.Link(theirs)] if callers == "link" and theirs.is_valid else []


@contextmanager
def _attached(context: Context) -> Generator[None, None, None]:
    token = otel_context.attach(context)
    try:
        yield
    finally:
        otel_context.detach(token)


_CALLERS_FAULT = frozenset(
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


def _parser(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    assert deserialize is not None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            raise errors.InvalidText(
                "the request cannot be parsed: every text must be valid UTF-8, and the message must be of "
                f"the type that the contract names ({error})"
            ) from None

    return parse


async def _message(context: Any, hold: Hold, limit: int, turn: Turn) -> bytes:
    """The one message of a unary request, charged to *hold*; ends the *turn* if the message is not there yet.

    Raises Busy, MessageTooLarge, InvalidRequest if there is none, and DeadlineExceeded if it takes too long.
    """
    refused: errors.Busy | None = None
    late: asyncio.TimerHandle
    loop = asyncio.get_running_loop()

    def pause(left: int) -> None:
        nonlocal refused, late
        if left:
            late = loop.call_later(PAUSE_SECONDS, pause, left - 1)
            return
        turn.end()
        try:
            hold.reserve()
        except errors.Busy as error:
            refused = error
            reading.reschedule(loop.time())

    try:
        async with asyncio.timeout(READ_SECONDS) as reading:
            late = loop.call_later(PAUSE_SECONDS, pause, PROMPT_PAUSES - 1)
            try:
                data = await context.read()
            finally:
                late.cancel()
    except TimeoutError:
        if refused is not None:
            raise refused from None
        raise errors.DeadlineExceeded(f"the request did not arrive within {READ_SECONDS:g} s") from None
    if data is grpc.aio.EOF:
        raise errors.InvalidRequest("the call ended without a request message")
    if len(data) > limit:
        raise errors.MessageTooLarge(
            f"the request has {len(data)} bytes, this method takes {limit}", size=len(data), limit=limit
        )
    hold.resize(len(data))
    return bytes(data)


def _end_of_call(error: Exception) -> grpc.aio.BaseError | None:
    """gRPC's own error where the caller left in mid-write, or the server stopped; gRPC deals with it."""
    inner = errors.unwrap(error)
    if isinstance(inner, grpc.aio.UsageError):  # a fault of ours
        return None
    return inner if isinstance(inner, grpc.aio.BaseError) else None


def _ours(error: Exception, method: str) -> errors.HeadraceError:
    """The error as the caller may see it; anything unexpected goes to the log in full."""
    inner = errors.unwrap(error)
    if isinstance(inner, errors.HeadraceError):
        return inner
    if isinstance(inner, NotImplementedError):  # how generated servicers answer what they do not have
        return errors.Unimplemented(f"this server does not have {method.lstrip('/')}")
    log.error("unexpected error", exc_info=error, extra={"method": method})
    return errors.InternalError("internal error; the server's log has it in full")


def _let_go(error: BaseException | None) -> None:
    """Drop the frames that an error has come through: they hold the request, and some hold the error."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


async def _abort(context: Any, error: errors.HeadraceError) -> None:
    status = statuses.to_status(error)
    _let_go(error)
    await context.abort(
        error.code,
        status.message,
        trailing_metadata=((statuses.DETAILS_KEY, status.SerializeToString()),),
    )
