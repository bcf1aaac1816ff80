"""Hand the events of one call on a shared stream to its reader, and bound what waits for it.

Events of a reader that is behind are gathered: a delta joins the one before it. The credit of the call is
raised as its reader takes them.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from headrace.flushing import Flusher, chooses_flushing
from headrace.multiplex.call import Call, Take
from headrace.multiplex.joining import joined
from headrace.v1 import generation_pb2 as pb

CREDIT = 64  # events that a server may send ahead of a call's reader
# Events that a reader has taken when credit for as many more is sent. Once one has, credit for the others is
# sent with it, if they have taken enough: else each call would need messages of its own.
_GRANTED_AT, _JOINED_AT = CREDIT // 2, CREDIT // 4
# Tokens of events that are gathered for a reader that is behind, with the most likely ones at each place.
MAX_GATHERED = 1024


class Stream(Protocol):
    """The stream of a call."""

    def cancel(self, handle: int) -> None:
        """Cancel a call."""
        ...

    def grant(self) -> None:
        """Let the server send further events of all calls that have `due_credit`."""
        ...


class SharedCall:
    """A call on a shared stream; see `call.Call`.

    request, metadata   as it was started
    deadline            on the clock of time.monotonic; None if there is none
    gathered_at         see `flushing.Gatherer`

    flusher   when gathered tokens are handed over; None: each at once
    """

    __slots__ = (
        "_arrived", "_detailed", "_ended", "_error", "_flusher", "_gathers", "_granted", "_handle",
        "_instead", "_most", "_read", "_ready", "_received", "_stream", "_take", "_waiter", "deadline",
        "gathered_at", "metadata", "request",
    )  # fmt: skip

    def __init__(
        self,
        stream: Stream,
        handle: int,
        request: pb.GenerateRequest,
        deadline: float | None,
        metadata: Sequence[tuple[str, str]],
        flusher: Flusher | None,
    ) -> None:
        self.request = request
        self.metadata = metadata
        self.deadline = deadline
        self.gathered_at = -math.inf
        self._stream = stream
        self._handle = handle
        self._flusher = flusher
        self._arrived: deque[pb.GenerateResponse] = deque()
        self._received = 0  # events
        self._read = 0  # events that the reader has taken, of those that had arrived then
        self._granted = 0  # the same when credit was sent
        self._ready = False  # whether `next` returns without waiting
        self._waiter: asyncio.Future[None] | None = None
        self._take: Take | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._instead: Call | None = None
        # A caller that chose how the answer is split receives it so.
        self._gathers = not chooses_flushing(request)
        self._detailed = request.sampling.HasField("top_logprobs")
        self._most = MAX_GATHERED // (1 + request.sampling.top_logprobs)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline; None if there is none."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)

    async def next(self) -> pb.GenerateResponse | None:
        """See `call.Call`."""
        if not self._ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._arrived:
            response = self._arrived.popleft()
            self._ready = bool(self._arrived) or self._ended
            self._grant()
            return response
        if self._instead is not None:
            return await self._instead.next()
        if self._error is not None:
            raise self._error
        return None

    def offer(self, take: Take) -> None:
        """See `call.Call`."""
        self._take = take

    def cancel(self) -> None:
        """See `call.Call`."""
        if self._instead is not None:
            self._instead.cancel()
        elif not self._ended:
            self._ended = True
            self._stream.cancel(self._handle)
            self.flush()

    def fail(self, error: Exception) -> None:
        """See `call.Call`."""
        if self._instead is not None:
            self._instead.fail(error)
        elif not self._ended:
            self._end(error)
            self._stream.cancel(self._handle)

    # For the stream.

    def receive(self, response: pb.GenerateResponse, *, alone: bool = False) -> bool:
        """Take the next event. Returns whether it is the last one.

        alone   no further event of this call has arrived. Otherwise the reader takes them together
        """
        self._received += 1
        if alone and self._take is not None and self._offered(response, self._take):
            return False
        arrived = self._arrived
        if not (arrived and self._gathers and joined(arrived[-1], response, self._most)):
            arrived.append(response)
        elif self._detailed:
            arrived[-1].delta.tokens.extend(response.delta.tokens)
        self._ended = response.HasField("finish")
        if self._ready:
            return self._ended
        if self._flusher is None or self._ended or not self._may_wait(arrived[-1], self._flusher):
            self.flush()
        elif self.gathered_at < 0:
            self._flusher.watch(self)
        return self._ended

    def _offered(self, response: pb.GenerateResponse, take: Take) -> bool:
        """Offer an event, and return whether nothing is left to do with it."""
        waiter = self._waiter
        # Nothing has arrived before it if the reader waits, except what is gathered. A reader that was
        # cancelled is done.
        if waiter is None or waiter.done() or self._arrived or not response.HasField("delta"):
            return False
        try:
            taken = take(response)
        except Exception as error:
            self.fail(error)
            return True
        if taken:
            self._grant()
        return taken

    def _grant(self) -> None:
        """Count the events that the reader has taken, and raise the credit if they are enough."""
        self._read = self._received - len(self._arrived)
        if self._read >= self._granted + _GRANTED_AT and not self._ended:
            self._stream.grant()

    def due_credit(self) -> int:
        """Return the events that may be sent in all, if it is time to raise their number; otherwise 0."""
        if self._ended or self._read < self._granted + _JOINED_AT:
            return 0
        self._granted = self._read
        return self._granted + CREDIT

    def flush(self) -> None:
        """Let the reader take what there is."""
        self._ready = True
        self.gathered_at = -math.inf
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():  # its reader was cancelled
                waiter.set_result(None)

    def lose(self, error: BaseException) -> None:
        """End with *error*, which the server sent or which ended the stream."""
        # A copy for each call: raising an exception attaches the stack of the one who raises it.
        self._end(copy.copy(error))

    def replace(self, call: Call) -> None:
        """Continue with another call."""
        self._instead = call
        self._ended = True
        self.flush()

    @staticmethod
    def _may_wait(gathered: pb.GenerateResponse, flusher: Flusher) -> bool:
        """Whether gathered tokens wait for more: the first token and other events never do."""
        if not gathered.HasField("delta"):
            return False
        delta = gathered.delta
        return delta.offset > 0 and 0 < delta.token_count < flusher.tokens

    def _end(self, error: BaseException) -> None:
        self._error = error
        self._ended = True
        self.flush()
