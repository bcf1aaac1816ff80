"""Intercept every RPC of a server: admission, reading of the request, and error statuses. `calls` runs it.

A call is admitted before its message is read, and the message of a unary request is read here rather than by
gRPC: the handler is registered as a streaming one and reads once. A rejected call therefore costs neither the
memory of its message nor the time to parse it.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, aclosing
from dataclasses import replace
from typing import Any, TypeAlias

import grpc

from headrace import errors, statuses
from headrace.metrics.requests import record_refusal
from headrace.runtime.security.guard import Peer
from headrace.runtime.security.identity import acting_as
from headrace.runtime.serving.calls import Calls, drop_frames, end_of_call, reported
from headrace.runtime.serving.fair_semaphore import FairSemaphore, Permit
from headrace.runtime.serving.inflight import InflightBudget
from headrace.runtime.serving.memory_reclaim import Reclaimer
from headrace.runtime.serving.request_message import parser, read_message
from headrace.runtime.serving.servicer_context import StreamingContext

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

HEADRACE_METHODS = "/headrace."  # prefix
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
# The part of the calls that may watch the health, beside all others: anybody may, and for any time.
WATCH_SHARE = 0.25

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

    untracked   full names of methods that are not requests: they have no spans and do not count as requests
                in flight
    """

    def __init__(self, calls: Calls, *, untracked: frozenset[str] = frozenset()) -> None:
        self._calls = calls
        self._guard = calls.guard
        self._budget = calls.budget
        limits = calls.budget.limits
        self._watches = InflightBudget(replace(limits, max_calls=int(limits.max_calls * WATCH_SHARE)))
        self._starting = FairSemaphore(MAX_STARTING)
        # Of what needs no credentials, so that it delays no request.
        self._starting_untracked = FairSemaphore(MAX_STARTING)
        self._starting_long = FairSemaphore(1)
        self._reclaimer = Reclaimer()
        self._untracked = untracked

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
        starting = self._starting_untracked if untracked else self._starting
        budget = self._watches if method == HEALTH_WATCH else self._budget
        exempt = method == HEALTH_CHECK or (untracked and headrace and not handler.request_streaming)

        async def respond(requests: Any, context: Any) -> Any:
            if handler.response_streaming:
                context = StreamingContext(context)
            return await around(method, context, lambda: admitted(requests, context))

        async def admitted(requests: Any, context: Any) -> Any:
            peer = context.peer()
            with ExitStack() as stack:
                try:
                    identity = await self._guard.identify(
                        method, context.invocation_metadata() or (), Peer(peer, context.auth_context())
                    )
                    reservation = stack.enter_context(budget.admit(peer, exempt=exempt))
                except errors.HeadraceError as error:
                    record_refusal(error)
                    raise
                stack.enter_context(acting_as(identity))
                try:
                    if handler.request_streaming:
                        return await answer(requests, context)
                    permit = await starting.acquire(peer)
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
                finally:
                    self._reclaimer.released(reservation.size)

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
            if (end := end_of_call(error)) is not None:
                raise end from None
            await _abort(context, reported(error, method))

    async def _traced(self, method: str, context: Any, call: Callable[[], Awaitable[Any]]) -> Any:
        result = None

        async def keep_result() -> None:
            nonlocal result
            result = await call()

        error = await self._calls.run(
            method.lstrip("/"),
            context.invocation_metadata() or (),
            context.time_remaining,
            keep_result,
            status=context.code,
        )
        if error is not None:
            await _abort(context, error)
        return result


async def _abort(context: Any, error: errors.HeadraceError) -> None:
    status = statuses.to_status(error)
    drop_frames(error)
    await context.abort(
        error.code,
        status.message,
        trailing_metadata=((statuses.DETAILS_KEY, status.SerializeToString()),),
    )
