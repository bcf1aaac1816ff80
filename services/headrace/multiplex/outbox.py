"""Gather the events that one Multiplex stream sends next.

Events that are due in one iteration of the event loop leave in one message. An `EventWriter` adds those of
one request, as far as its caller reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from headrace import errors, statuses
from headrace.metrics import catalogue
from headrace.multiplex.stream_request import StreamRequest
from headrace.runtime.serving.calls import drop_frames
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import multiplex_pb2 as wire

# Unsent bytes of events, above which a stream's requests wait, and no further ones start: its caller does not
# read.
MAX_UNSENT_BYTES = 1 << 20


class Outbox:
    """What one stream sends.

    message     the next message; set `has_unsent` after a change
    has_unsent  whether there is something to send, or the stream is complete
    """

    def __init__(self, epoch: int) -> None:
        self.message = wire.MultiplexResponse(welcome=wire.MultiplexWelcome(epoch=epoch))
        self.has_unsent = asyncio.Event()
        self.has_unsent.set()
        self._bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()

    @property
    def full(self) -> bool:
        """Whether no event may be added before a message was sent."""
        return self._bytes > MAX_UNSENT_BYTES

    async def until_room(self) -> None:
        """Wait until it is not full."""
        while self._bytes > MAX_UNSENT_BYTES:
            self._has_room.clear()
            await self._has_room.wait()

    def add(self, handle: int, response: pb.GenerateResponse) -> None:
        """Add an event of a request."""
        event = self.message.events.add()
        event.handle = handle
        event.response.CopyFrom(response)
        self._bytes += event.ByteSize()
        self.has_unsent.set()

    def end(self, handle: int, error: errors.HeadraceError) -> None:
        """Add the error that ends a request."""
        event = self.message.events.add()
        event.handle = handle
        event.error.CopyFrom(statuses.to_status(error))
        self._bytes += event.ByteSize()
        drop_frames(error)

    async def send(self, write: Callable[[wire.MultiplexResponse], Awaitable[None]]) -> None:
        """Wait until something is due, and send it in one message."""
        await self.has_unsent.wait()
        # Some answers write where a message arrives, and others in their tasks, which it resumes: all in one.
        await asyncio.sleep(0)
        self.has_unsent.clear()
        message, self.message = self.message, wire.MultiplexResponse()
        size = self._bytes
        if size or message.ByteSize():
            await write(message)
        self._bytes -= size
        self._has_room.set()


class EventWriter:
    """Writes the events of one request.

    finished   whether the last event was written
    """

    __slots__ = ("_outbox", "_request", "finished")

    def __init__(self, request: StreamRequest, outbox: Outbox) -> None:
        self.finished = False
        self._request = request
        self._outbox = outbox

    @property
    def ready(self) -> bool:
        """Whether an event can be written with `write_now`. The first one cannot."""
        request = self._request
        return 0 < request.sent < request.credit and not self.finished and not self._outbox.full

    def write_now(self, response: pb.GenerateResponse) -> None:
        """Write an event that is not the last one, while `ready`."""
        request = self._request
        request.sent += 1
        self._outbox.add(request.handle, response)

    async def __call__(self, response: pb.GenerateResponse) -> None:
        """Write an event once the caller has given credit for it and the stream has room."""
        if self.finished:
            return  # nothing follows the last event
        request = self._request
        if request.sent >= request.credit:
            catalogue.CREDIT_STALLS.of(tier="", credit="reader").add()
        while request.sent >= request.credit:
            request.has_credit = asyncio.get_running_loop().create_future()
            await request.has_credit
        await self._outbox.until_room()
        if not request.sent:
            request.starting.release()
        self.finished = response.HasField("finish")
        self.write_now(response)
