"""Serve Multiplex: many requests of one caller on one stream, each answered as a call of Generate is.

`Multiplexer` is the servicer's side: it runs each request as one task, by the same function that answers
Generate. Events that the tasks produce in one iteration of the event loop leave in one message.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from headrace import errors
from headrace.deadline import Deadline
from headrace.metrics.requests import record_refusal
from headrace.multiplex.limits import MAX_HANDLES, MAX_OPENS
from headrace.multiplex.outbox import EventWriter, Outbox
from headrace.multiplex.request_identity import RequestIdentities
from headrace.multiplex.stream_request import StreamRequest
from headrace.runtime.security.identity import Identity, acting_as
from headrace.runtime.serving.calls import Calls, Metadata, drop_frames, reported
from headrace.runtime.serving.fair_semaphore import FairSemaphore, Permit
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import multiplex_pb2 as wire
from headrace.validation import MAX_REQUEST_ID, seconds_of

log = logging.getLogger(__name__)

METHOD = "/headrace.v1.GenerationService/Multiplex"
HELLO_SECONDS = 10.0  # for the first message of a stream to arrive
# Requests of a message that start, or are cancelled, before other tasks of the event loop run.
TURN = 16
# Requests of all callers that have started and have no event yet; callers take turns. One that opens hundreds
# and cancels them must not fill the queues of the services behind this one.
MAX_STARTING = 64
WATCH_SECONDS = 0.25  # between checks of deadlines
CROSSING_SECONDS = 2.0  # for requests to arrive that crossed with the announcement that their stream ends

_GENERATE = "headrace.v1.GenerationService/Generate"

Context: TypeAlias = grpc.aio.ServicerContext[Any, wire.MultiplexResponse]
Write: TypeAlias = Callable[[pb.GenerateResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Incoming:
    """One request, however it arrived.

    time_remaining   seconds until the deadline; None if there is none
    identity         who calls
    metadata         of the call
    framed           whether its events travel in messages that it shares with other requests: then the number
                     of its events matters little
    """

    request: pb.GenerateRequest
    time_remaining: float | None
    identity: Identity
    metadata: Metadata = ()
    framed: bool = False


# Answers a request through the function, and returns after the last event. Raises the error that ends it.
Answer: TypeAlias = Callable[[Incoming, Write], Awaitable[None]]


class Multiplexer:
    """Serves the Multiplex streams of one server."""

    def __init__(self, answer: Answer, calls: Calls) -> None:
        self._answer = answer
        self._calls = calls
        self._starting = FairSemaphore(MAX_STARTING)
        self._turns = FairSemaphore(1)

    async def serve(self, context: Context) -> None:
        """Serve one stream until its caller is done, or the server has drained.

        It reads from the context, not from gRPC's iterator of requests, which holds the last message: an idle
        stream must not hold megabytes.

        Raises InvalidRequest and InvalidText for messages that violate the contract.
        """
        first = await _first(context)
        caller = {"caller": first.hello.caller_id, "epoch": first.hello.epoch}
        log.info("shared stream opened", extra=caller)
        stream = _Stream(
            self._answer,
            self._calls,
            self._starting,
            self._turns,
            context.peer(),
            first.hello.epoch,
            RequestIdentities(self._calls.guard, context),
        )
        try:
            # A task that fails ends the others, and the stream with its error as the status.
            async with asyncio.TaskGroup() as tasks:
                others = [
                    tasks.create_task(stream.read(first, context)),
                    tasks.create_task(stream.announce_drain()),
                    tasks.create_task(stream.end_late_requests()),
                ]
                del first
                await stream.write(context.write)
                for task in others:
                    task.cancel()
        except ExceptionGroup as group:
            drop_frames(group)  # which hold a message, and the group itself
            raise errors.unwrap(group) from None
        finally:
            await stream.cancel_all()
            log.info("shared stream ended", extra=caller)


class _Stream:
    """One Multiplex stream, as the server sees it."""

    def __init__(
        self,
        answer: Answer,
        calls: Calls,
        starting: FairSemaphore,
        turns: FairSemaphore,
        peer: str,
        epoch: int,
        identities: RequestIdentities,
    ) -> None:
        self._answer = answer
        self._calls = calls
        self._starting = starting
        self._turns = turns
        self._peer = peer
        self._identities = identities
        self._requests: dict[int, StreamRequest] = {}
        self._last_handle = 0
        self._complete = False  # no further request comes
        self._outbox = Outbox(epoch)

    async def read(self, message: Any, context: Context) -> None:
        """Handle the caller's messages, of which *message* is the first, until it half-closes."""
        while message is not grpc.aio.EOF:
            await self._handle(message)
            del message  # not held while the next one is awaited
            message = await context.read()
            if message is not grpc.aio.EOF and message.HasField("hello"):
                raise errors.InvalidRequest("hello must be sent only once, first", field="hello")
        for request in self._requests.values():
            request.grant(math.inf)  # no credit comes any more
        self._finish()

    async def write(self, write: Callable[[wire.MultiplexResponse], Awaitable[None]]) -> None:
        """Send what is due until the stream is complete."""
        while not (self._complete and not self._requests and not self._outbox.has_unsent.is_set()):
            await self._outbox.send(write)

    async def announce_drain(self) -> None:
        """Once the server drains, or the connection is old, have the caller use another stream; end this."""
        drain_began = self._calls.requests.drain_began.wait
        with suppress(TimeoutError):
            await asyncio.wait_for(drain_began(), self._calls.budget.limits.max_stream_age)
        self._outbox.message.draining = True
        self._outbox.has_unsent.set()
        # Requests that were sent before the caller reads this are answered, unless the server drains.
        with suppress(TimeoutError):
            await asyncio.wait_for(drain_began(), CROSSING_SECONDS)
        self._finish()

    async def end_late_requests(self) -> None:
        """End requests whose deadline has passed: the last resort, as gRPC is for a call.

        It also lets others start in place of requests that have been starting since the check before.
        """
        starting: list[StreamRequest] = []
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            latest = time.monotonic() - WATCH_SECONDS
            for request in starting:
                request.starting.release()
            starting = [request for request in self._requests.values() if not request.sent]
            for request in self._requests.values():
                if request.deadline.passed(latest) and request.task is not None and not request.late:
                    request.late = True
                    request.task.cancel()

    async def cancel_all(self) -> None:
        """Cancel all requests: the stream is lost, or violates the contract."""
        tasks = [request.task for request in self._requests.values() if request.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _finish(self) -> None:
        self._complete = True
        self._outbox.has_unsent.set()

    async def _handle(self, message: wire.MultiplexRequest) -> None:
        for handles, limit, name in (
            (message.open, MAX_OPENS, "open"),
            (message.cancel, MAX_HANDLES, "cancel"),
            (message.credit, MAX_HANDLES, "credit"),
        ):
            if len(handles) > limit:
                raise errors.InvalidRequest(
                    f"a message has {len(handles)} entries of `{name}`; at most {limit} are allowed",
                    field=name,
                )
        if message.ping:
            self._outbox.message.pong = message.ping
            self._outbox.has_unsent.set()
        for first in range(0, len(message.open), TURN):
            await self._outbox.until_room()  # requests that fail at once would fill the memory with errors
            await self._start_all(message.open[first : first + TURN])
        for credit in message.credit:
            if (request := self._requests.get(credit.handle)) is not None:
                request.grant(credit.events)
        running = [handle for handle in message.cancel if handle in self._requests]
        for first in range(0, len(running), TURN):
            await self._cancel_in_turn(running[first : first + TURN])

    async def _start_all(self, opened: Sequence[wire.OpenRequest]) -> None:
        """Start requests, at most TURN of them, before the next caller's turn."""
        at = 0
        while at < len(opened):
            # Only the first permit is waited for: streams that held some and waited for more would wait for
            # each other.
            permit = await self._starting.acquire(self._peer)
            try:
                turn = await self._turns.acquire(self._peer)
            except BaseException:
                permit.release()
                raise
            try:
                next_permit: Permit | None = permit
                while next_permit is not None and at < len(opened):
                    self._start(opened[at], next_permit)
                    at += 1
                    next_permit = self._starting.acquire_free() if at < len(opened) else None
            except errors.InvalidRequest:
                if next_permit is not None:
                    next_permit.release()
                raise
            finally:
                try:
                    await asyncio.sleep(0)  # their tasks begin before anything can cancel them
                finally:
                    turn.release()

    async def _cancel_in_turn(self, handles: Sequence[int]) -> None:
        """Cancel requests, and let all tasks run, before the next caller's turn."""
        permit = await self._turns.acquire(self._peer)
        try:
            for handle in handles:
                if (request := self._requests.get(handle)) is not None and request.task is not None:
                    request.task.cancel()
            await asyncio.sleep(0)
        finally:
            permit.release()

    def _start(self, opened: wire.OpenRequest, starting: Permit) -> None:
        handle = opened.handle
        if handle <= self._last_handle:
            raise errors.InvalidRequest(
                f"handle {handle} is not greater than {self._last_handle}, the last one", field="open.handle"
            )
        self._last_handle = handle
        credit = opened.credit if opened.HasField("credit") else math.inf
        request = self._requests[handle] = StreamRequest(handle, credit, starting)
        # Its own context: the requests of a stream share neither span nor baggage.
        request.task = asyncio.get_running_loop().create_task(
            self._run(request, opened), context=contextvars.Context()
        )
        request.task.add_done_callback(lambda _: starting.release())  # also of a task that never began

    async def _run(self, request: StreamRequest, opened: wire.OpenRequest) -> None:
        """Answer one request, and end it on the stream."""
        error: errors.HeadraceError | None
        write = EventWriter(request, self._outbox)

        async def answer() -> None:
            seconds = seconds_of(opened.ttl, "open.ttl") if opened.HasField("ttl") else None
            request.deadline = Deadline.after(seconds, time.monotonic())
            with ExitStack() as stack:
                try:
                    # Unlike the message of a call of its own, this one is in memory already.
                    reservation = stack.enter_context(self._calls.budget.admit(self._peer))
                    reservation.resize(opened.ByteSize())
                    identity = await self._identities.of(metadata)
                except errors.HeadraceError as refused:
                    record_refusal(refused)
                    raise
                stack.enter_context(acting_as(identity))
                await self._answer(Incoming(opened.request, seconds, identity, metadata, framed=True), write)

        metadata = list(opened.metadata.items())
        try:
            error = await self._calls.run(
                _GENERATE, metadata, lambda: request.deadline.left(time.monotonic()), answer
            )
        except asyncio.CancelledError:
            error = (
                errors.DeadlineExceeded("the deadline passed before the answer was complete")
                if request.late
                else errors.RequestCancelled("the caller cancelled the request")
            )
        except Exception as raised:
            error = reported(raised, _GENERATE)
        del self._requests[request.handle]
        if not write.finished:
            self._outbox.end(request.handle, error or errors.Unavailable("the answer ended without a finish"))
        self._outbox.has_unsent.set()


async def _first(context: Context) -> Any:
    """Read the first message, within HELLO_SECONDS."""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            first = await context.read()
    except TimeoutError:
        raise errors.InvalidRequest(f"no hello within {HELLO_SECONDS:g} s", field="hello") from None
    if first is grpc.aio.EOF or not first.HasField("hello"):
        raise errors.InvalidRequest("the first message of a stream must contain hello", field="hello")
    if len(first.hello.caller_id) > MAX_REQUEST_ID:
        raise errors.InvalidRequest(
            f"caller_id has {len(first.hello.caller_id)} characters; at most {MAX_REQUEST_ID} are allowed",
            field="hello.caller_id",
        )
    return first
