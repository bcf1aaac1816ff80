"""The way of one answer's tokens from the worker's frames to the one who reads them."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass

from headrace import errors
from headrace.v1 import generation_pb2 as pb

FLUSH_SECONDS = 0.1
MESSAGES_PER_SECOND = 1000.0  # at ease: each takes some 0.2 ms of CPU here, and as much at each hop after
MOST_TOKENS = 32  # of one message


@dataclass(frozen=True, slots=True)
class Flush:
    """How tokens are gathered into one message.

    tokens    as many, or
    seconds   until the first of them has waited so long
    """

    tokens: int = 1
    seconds: float = FLUSH_SECONDS


def flush_for(streams: int, tokens_per_second: float) -> Flush:
    """Gather more, the more there is to say: messages are what costs, not tokens.

    streams             answers under way
    tokens_per_second   of all of them together

    One event loop sends some thousand messages a second: a handful of readers get each token as it comes,
    hundreds get 8 at a time, and more where even that would be more messages than it can send.
    """
    shared = 1 if streams <= 16 else 2 if streams <= 32 else 4 if streams <= 64 else 8
    return Flush(min(max(shared, math.ceil(tokens_per_second / MESSAGES_PER_SECOND)), MOST_TOKENS))


@dataclass(frozen=True, slots=True)
class End:
    """How a sequence ended at the worker.

    reason    STOP, LENGTH, CANCELLED or DEADLINE
    """

    reason: pb.FinishReason.ValueType
    usage: pb.Usage
    timing: pb.Timing


@dataclass(frozen=True, slots=True)
class Move:
    """The answer goes on at another worker, or at the same one after it came back.

    reason    why it left, as an error reason
    attempt   the attempt that begins
    """

    origin: str
    target: str
    reason: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that came in, a move, and the end if it came."""

    ids: list[int]
    logprobs: list[float]
    end: End | None
    move: Move | None = None


class Inbox:
    """Tokens of one sequence that wait to be read.

    The first token wakes the reader at once; later ones gather as `flush` says. One reader, same event
    loop. Bounded: no more than *limit* tokens are taken in.
    """

    def __init__(self, flush: Flush, *, limit: int = 1 << 20) -> None:
        self.flush = flush
        self.limit = limit
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._unread = 0
        self._before: deque[Arrival] = deque()  # what lies before the tokens above: up to the last move
        self._end: End | None = None
        self._error: errors.HeadraceError | None = None
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._first = True

    @property
    def unread(self) -> int:
        """Tokens that wait for the reader."""
        return self._unread

    @property
    def full(self) -> bool:
        """Whether it takes no more until the reader has taken some."""
        return self._unread >= self.limit

    @property
    def caught_up(self) -> bool:
        """Whether the reader of a full inbox has read enough for more to come: half of it."""
        return self._unread <= self.limit // 2

    @property
    def closed(self) -> bool:
        """Whether the end is in, good or bad."""
        return self._end is not None or self._error is not None

    def put(self, ids: list[int], logprobs: list[float]) -> int:
        """More tokens, in order; returns how many of them were taken in."""
        taken = min(len(ids), self.limit - self._unread)
        self._ids += ids[:taken]
        self._logprobs += logprobs[:taken]
        self._unread += taken
        if self._first or len(self._ids) >= self.flush.tokens or self.full:
            self._wake()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.flush.seconds, self._wake)
        return taken

    def move(self, move: Move) -> None:
        """What comes after this comes from elsewhere."""
        if self._ids:
            self._before.append(Arrival(self._ids, self._logprobs, None))
            self._ids, self._logprobs = [], []
        self._before.append(Arrival([], [], None, move))
        self._wake()

    def end(self, end: End) -> None:
        """No more will come."""
        self._end = end
        self._wake()

    def fail(self, error: errors.HeadraceError) -> None:
        """No more will come, and this is why."""
        self._error = error
        self._wake()

    async def take(self) -> Arrival:
        """Wait for what is next. Tokens that came before a failure are given first."""
        await self._ready.wait()
        self._ready.clear()
        if self._before:
            self._ready.set()  # there may be more behind it; if not, an empty arrival does no harm
            arrival = self._before.popleft()
            self._unread -= len(arrival.ids)
            return arrival
        self._first = self._first and not self._ids
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ids, logprobs = self._ids, self._logprobs
        self._ids, self._logprobs = [], []
        self._unread -= len(ids)
        if self._error is not None:
            if not ids:
                raise self._error
            self._ready.set()
            return Arrival(ids, logprobs, None)
        return Arrival(ids, logprobs, self._end)

    def _wake(self) -> None:
        self._ready.set()
