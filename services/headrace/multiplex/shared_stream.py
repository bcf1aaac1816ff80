"""Implement the caller's end of one Multiplex stream.

Requests, cancellations and credits that are due in one iteration of the event loop travel in one message.
Events are handed to their calls (`shared_call`) as they arrive.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence

import grpc

from headrace import errors, statuses
from headrace.flushing import Flusher
from headrace.multiplex.call import Call
from headrace.multiplex.limits import MAX_HANDLES, MAX_OPENS, MESSAGE_BYTES
from headrace.multiplex.shared_call import CREDIT, SharedCall
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import multiplex_pb2 as wire

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.25  # between checks of deadlines and of the stream
PING_CHECKS = 4  # checks without a message, after which the stream is pinged
# The server reports a missed deadline itself. If it does not, the call ends this much later.
LATE_SECONDS = 0.25
MAX_HANDLE = 2**32 - 1
NOT_OFFERED = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)  # before the welcome


class SharedStream:
    """One Multiplex stream, from its opening to its end.

    accepts_calls   whether further calls may be opened on it

    stall_seconds   it is lost if the server is silent for so long while calls wait
    idle_seconds    it is closed when there were no calls for so long; None: never
    instead         makes a call of its own for one on a stream that the server does not offer
    on_end          called when the stream has ended
    """

    def __init__(
        self,
        rpc: grpc.aio.StreamStreamCall[wire.MultiplexRequest, wire.MultiplexResponse],
        *,
        epoch: int,
        caller_id: str,
        stall_seconds: float,
        idle_seconds: float | None,
        instead: Callable[[SharedCall], Call],
        on_end: Callable[[SharedStream], None],
    ) -> None:
        self.accepts_calls = True
        self._rpc = rpc
        self._epoch = epoch
        self._stall_checks = max(round(stall_seconds / WATCH_SECONDS), PING_CHECKS + 1)
        self._idle_checks = math.inf if idle_seconds is None else round(idle_seconds / WATCH_SECONDS)
        self._instead = instead
        self._on_end = on_end
        self._calls: dict[int, SharedCall] = {}
        self._handle = 0  # the last one in use
        self._welcomed = asyncio.Event()
        self._silent_checks = 0
        self._unsent: deque[wire.MultiplexRequest] = deque(
            [wire.MultiplexRequest(hello=wire.MultiplexHello(caller_id=caller_id, epoch=epoch))]
        )
        self._unsent_bytes = 0  # of the requests in the last of them
        self._has_unsent = asyncio.Event()
        self._has_unsent.set()
        # Its own context: the stream belongs to no request, and so to no trace.
        self._running = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    def open(
        self,
        request: pb.GenerateRequest,
        *,
        timeout: float | None,
        metadata: Sequence[tuple[str, str]],
        flusher: Flusher | None = None,
    ) -> SharedCall:
        """Start a call. The arguments are those of `calling.Caller.call`."""
        self._handle = handle = self._handle + 1
        if handle == MAX_HANDLE:
            self.accepts_calls = False
        now = time.monotonic()
        deadline = None if timeout is None else now + timeout
        call = self._calls[handle] = SharedCall(self, handle, request, deadline, metadata, flusher)
        message = self._message()
        if len(message.open) >= MAX_OPENS or self._unsent_bytes >= MESSAGE_BYTES:
            message = self._next_message()
        opened = message.open.add(handle=handle, credit=CREDIT)
        opened.request.CopyFrom(request)
        if timeout is not None:
            opened.ttl.FromNanoseconds(max(int(timeout * 1e9), 0))
        for key, value in metadata:
            opened.metadata[key] = value
        self._unsent_bytes += opened.ByteSize()
        return call

    def cancel(self, handle: int) -> None:
        """Cancel a call. The server confirms, but nothing more of it is delivered."""
        if self._calls.pop(handle, None) is not None and not self._unsend(handle):
            message = self._message()
            if len(message.cancel) >= MAX_HANDLES:
                message = self._next_message()
            message.cancel.append(handle)

    def grant(self) -> None:
        """Let the server send further events of all calls that have `due_credit`."""
        message = self._message()
        for handle, call in self._calls.items():
            if events := call.due_credit():
                if len(message.credit) >= MAX_HANDLES:
                    message = self._next_message()
                message.credit.add(handle=handle, events=events)

    async def close(self) -> None:
        """End the stream, and all calls on it as cancelled."""
        self._running.cancel()
        await asyncio.wait([self._running])

    def _unsend(self, handle: int) -> bool:
        """Remove a request that has not been sent yet; return whether there was one.

        Else the requests of callers that leave would pile up while the server does not read.
        """
        for message in self._unsent:
            if message.open and message.open[-1].handle >= handle:
                at = bisect_left(message.open, handle, key=lambda opened: opened.handle)
                found = message.open[at].handle == handle
                if found:
                    del message.open[at]
                return found
        return False

    def _message(self) -> wire.MultiplexRequest:
        """Return the message that is being gathered."""
        self._has_unsent.set()
        return self._unsent[-1] if self._unsent else self._next_message()

    def _next_message(self) -> wire.MultiplexRequest:
        message = wire.MultiplexRequest()
        self._unsent.append(message)
        self._unsent_bytes = 0
        return message

    async def _run(self) -> None:
        """Read, write and watch the stream; at its end, end its calls."""
        error: BaseException
        try:
            async with asyncio.TaskGroup() as tasks:
                others = [tasks.create_task(self._write()), tasks.create_task(self._watch())]
                await self._read()
                for task in others:
                    task.cancel()
            error = errors.Unavailable("the server ended the stream")
        except asyncio.CancelledError:
            error = asyncio.CancelledError()  # the channel is closed; its other calls end in the same way
        except Exception as raised:
            error = _reason(raised)
        finally:
            self.accepts_calls = False
            self._rpc.cancel()  # has no effect after its end
        offered = self._welcomed.is_set() or await self._rpc.code() not in NOT_OFFERED
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if offered:
                call.lose(error)
            else:
                call.replace(self._instead(call))
        self._on_end(self)

    async def _read(self) -> None:
        calls = self._calls
        async for message in self._rpc:
            self._silent_checks = 0
            if message is None:
                raise errors.Unavailable("the server's message cannot be parsed: it is not a Headrace server")
            if not self._welcomed.is_set():
                if message.welcome.epoch != self._epoch:
                    raise errors.Unavailable(f"the welcome is for stream {message.welcome.epoch}")
                self._welcomed.set()
            events = list(message.events)  # whose elements take as long to get as several of their fields
            last = len(events) - 1
            for at, event in enumerate(events):
                handle = event.handle
                call = calls.get(handle)
                if call is None:
                    continue  # it was cancelled
                if event.HasField("response"):
                    alone = at == last or events[at + 1].handle != handle
                    if call.receive(event.response, alone=alone):
                        del calls[handle]
                elif event.HasField("error"):  # a later version may send other events
                    del calls[handle]
                    call.lose(statuses.from_status(event.error))
            if message.draining:
                self.accepts_calls = False

    async def _write(self) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent.clear()
            while self._unsent:
                await self._rpc.write(self._unsent.popleft())
                # Else the status of a server without Multiplex could arrive during a later write.
                await self._welcomed.wait()

    async def _watch(self) -> None:
        """Ping a silent stream, end it if it stays silent or idle, and end calls whose deadline has passed.

        It counts its own checks, not seconds, so that a delayed event loop is not taken for a silent server.
        """
        idle_checks = 0
        while idle_checks < self._idle_checks:
            await asyncio.sleep(WATCH_SECONDS)
            if not self._calls:
                self._silent_checks = 0
                idle_checks += 1
                continue
            idle_checks = 0
            self._silent_checks += 1
            if self._silent_checks >= self._stall_checks:
                seconds = self._stall_checks * WATCH_SECONDS
                raise errors.Unavailable(f"the server has sent nothing for {seconds:g} s")
            if self._silent_checks % PING_CHECKS == 0:
                self._message().ping = self._silent_checks
            late = time.monotonic() - LATE_SECONDS
            for call in list(self._calls.values()):
                if call.deadline is not None and call.deadline < late:
                    call.fail(errors.DeadlineExceeded("the deadline passed before the answer was complete"))
        self.accepts_calls = False
        await self._rpc.done_writing()


def _reason(raised: Exception) -> errors.HeadraceError:
    """Return the error for the calls of a stream that ended with *raised*."""
    if isinstance(raised, BaseExceptionGroup):
        # Reader and writer may both notice that the stream broke; the server's status explains most.
        statuses_, _ = raised.split(grpc.aio.AioRpcError)
        raised = _first(statuses_ if statuses_ is not None else raised)
    if isinstance(raised, grpc.aio.AioRpcError):
        return statuses.from_rpc_error(raised)
    if isinstance(raised, errors.HeadraceError):
        return raised
    if not isinstance(raised, asyncio.InvalidStateError | grpc.aio.BaseError):  # of the writer, after the end
        log.error("unexpected error on a shared stream", exc_info=raised)
    return errors.Unavailable(f"the stream to the server broke: {type(raised).__name__}")


def _first(group: BaseException) -> Exception:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    assert isinstance(group, Exception)
    return group
