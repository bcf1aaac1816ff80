"""Buffer the tokens of one answer between the worker's step frames and the response stream."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass

from headrace import errors
from headrace.v1 import generation_pb2 as pb

FLUSH_SECONDS = 0.1
# A comfortable rate: each message takes about 0.2 ms of CPU here, and as much at each further hop.
MESSAGES_PER_SECOND = 1000.0
MAX_TOKENS_PER_MESSAGE = 32


@dataclass(frozen=True, slots=True)
class FlushPolicy:
    """When gathered tokens are sent as one message.

    tokens    as soon as there are this many, or
    seconds   as soon as the first of them has waited this long
    """

    tokens: int = 1
    seconds: float = FLUSH_SECONDS


def flush_policy(streams: int, tokens_per_second: float) -> FlushPolicy:
    """Return the default policy under the current load: the cost is per message, not per token.

    streams             answers in flight
    tokens_per_second   of all of them together

    One event loop sends about a thousand messages per second. A handful of readers get each token at once,
    hundreds get 8 per message, and more if even that would exceed the rate.
    """
    shared = 1 if streams <= 16 else 2 if streams <= 32 else 4 if streams <= 64 else 8
    tokens = max(shared, math.ceil(tokens_per_second / MESSAGES_PER_SECOND))
    return FlushPolicy(min(tokens, MAX_TOKENS_PER_MESSAGE))


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """How a sequence ended at the worker.

    reason    STOP, LENGTH, CANCELLED or DEADLINE
    """

    reason: pb.FinishReason.ValueType
    usage: pb.Usage
    timing: pb.Timing


@dataclass(frozen=True, slots=True)
class WorkerChange:
    """The answer is resumed on another worker, or on the same one after a reconnect.

    reason    why it left *origin*, as an error reason
    attempt   the number of the new attempt
    """

    origin: str
    target: str
    reason: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a reader takes from an inbox: tokens, a change of worker, or the end."""

    ids: list[int]
    logprobs: list[float]
    end: SequenceEnd | None
    change: WorkerChange | None = None


class Inbox:
    """The unread tokens of one answer.

    The reader receives the first token immediately, and later ones as the flush policy says. For one reader
    on the same event loop. Bounded: it accepts no more than *limit* unread tokens.
    """

    def __init__(self, flush: FlushPolicy, *, limit: int = 1 << 20) -> None:
        self.flush = flush
        self.limit = limit
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._unread = 0
        self._earlier: deque[Arrival] = deque()  # before the tokens above: everything up to the last change
        self._end: SequenceEnd | None = None
        self._error: errors.HeadraceError | None = None
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._first = True

    @property
    def unread(self) -> int:
        """The number of tokens that wait for the reader."""
        return self._unread

    @property
    def full(self) -> bool:
        """Whether it accepts no tokens until the reader takes some."""
        return self._unread >= self.limit

    @property
    def caught_up(self) -> bool:
        """Whether the reader of a full inbox has read enough to resume the answer: half of the limit."""
        return self._unread <= self.limit // 2

    @property
    def closed(self) -> bool:
        """Whether the answer has ended or failed."""
        return self._end is not None or self._error is not None

    def put(self, ids: list[int], logprobs: list[float]) -> int:
        """Add tokens in order. Returns how many were accepted."""
        accepted = min(len(ids), self.limit - self._unread)
        self._ids += ids[:accepted]
        self._logprobs += logprobs[:accepted]
        self._unread += accepted
        if self._first or len(self._ids) >= self.flush.tokens or self.full:
            self._notify()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.flush.seconds, self._notify)
        return accepted

    def put_change(self, change: WorkerChange) -> None:
        """Add a change of worker; later tokens come from the new one."""
        if self._ids:
            self._earlier.append(Arrival(self._ids, self._logprobs, None))
            self._ids, self._logprobs = [], []
        self._earlier.append(Arrival([], [], None, change))
        self._notify()

    def end(self, end: SequenceEnd) -> None:
        """Complete the answer."""
        self._end = end
        self._notify()

    def fail(self, error: errors.HeadraceError) -> None:
        """Fail the answer; `take` raises *error* after the tokens before it."""
        self._error = error
        self._notify()

    async def take(self) -> Arrival:
        """Wait for the next arrival. Tokens from before a failure are returned first."""
        await self._ready.wait()
        self._ready.clear()
        if self._earlier:
            self._ready.set()  # more may follow; if not, the next arrival is empty, which is harmless
            arrival = self._earlier.popleft()
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

    def _notify(self) -> None:
        self._ready.set()
