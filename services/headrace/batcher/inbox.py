"""Buffer the tokens of one answer between the worker's step frames and the response stream."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from headrace.batcher.token_details import Score
from headrace.flushing import Flusher
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire


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


# What a reader may receive between tokens. A part of the prompt has at most the tokens of one event.
InboxEvent: TypeAlias = WorkerChange | wire.PromptLogprobs
# Takes tokens and their scores, or returns False without an effect.
Take: TypeAlias = Callable[[list[int], Sequence[Score]], bool]


class Arrival(NamedTuple):
    """What a reader takes from an inbox: tokens, an event between tokens, or the end.

    scores   one per token, or none
    """

    ids: list[int]
    scores: Sequence[Score]
    end: SequenceEnd | None
    event: InboxEvent | None = None


class Inbox:
    """The unread tokens of one answer.

    The reader receives the first token immediately, and later ones as the flusher says. For one reader on the
    same event loop. Bounded: it accepts no more than *limit* unread tokens.

    gathered_at   see `flushing.Gatherer`
    """

    def __init__(self, flusher: Flusher, *, limit: int = 1 << 20) -> None:
        self.limit = limit
        self.gathered_at = -math.inf  # nothing gathered
        self._flusher = flusher
        self._ids: list[int] = []
        self._scores: list[Score] = []
        self._unread = 0
        self._earlier: deque[Arrival] = deque()  # before the tokens above: everything up to the last event
        self._end: SequenceEnd | None = None
        self._error: Exception | None = None
        self._ready = False
        self._waiter: asyncio.Future[None] | None = None
        self._take: Take | None = None
        self._first = True

    @property
    def unread(self) -> int:
        """The number of tokens that wait for the reader."""
        return self._unread

    @property
    def ready(self) -> bool:
        """Whether `take` returns without waiting."""
        return self._ready

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

    def put(self, ids: list[int], scores: Sequence[Score]) -> int:
        """Add tokens in order, with a score for each or for none. Returns how many were accepted."""
        accepted, room = len(ids), self.limit - self._unread
        if accepted > room:
            accepted, ids, scores = room, ids[:room], scores[:room]
        self._ids += ids
        self._scores += scores
        self._unread += accepted
        if self._ready:
            return accepted
        if self._first or len(self._ids) >= self._flusher.tokens or accepted == room:
            self.flush()
        elif self.gathered_at < 0:
            self._flusher.watch(self)
        return accepted

    def offer(self, take: Take) -> None:
        """Offer tokens after the first to *take*, which returns whether it takes them, while `take` waits.

        What *take* raises fails the answer.
        """
        self._take = take

    def pass_on(self, ids: list[int], scores: Sequence[Score]) -> bool:
        """Offer tokens, unless others wait before them or they wait for more. Returns whether they are taken.

        Arguments as for `put`, which takes those that are not taken here.
        """
        waiter = self._waiter
        if self._take is None or waiter is None or waiter.done():  # of a reader that was cancelled
            return False
        if self._first or self._ids or len(ids) < self._flusher.tokens or len(ids) > self.limit:
            return False
        try:
            return self._take(ids, scores)
        except Exception as error:
            self.fail(error)
            return True

    def put_event(self, event: InboxEvent) -> None:
        """Add an event; later tokens follow it.

        Parts of the prompt do not count as unread, because all come before the first token:
        `waiting.prompt_details` limits them.
        """
        if self._ids:
            self._earlier.append(Arrival(self._ids, self._scores, None))
            self._ids, self._scores = [], []
        self._earlier.append(Arrival([], [], None, event))
        self.flush()

    def end(self, end: SequenceEnd) -> None:
        """Complete the answer."""
        self._end = end
        self.flush()

    def fail(self, error: Exception) -> None:
        """Fail the answer; `take` raises *error* after the tokens before it."""
        self._error = error
        self.flush()

    async def take(self) -> Arrival:
        """Wait for the next arrival. Tokens from before a failure are returned first."""
        if not self._ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._earlier:
            await asyncio.sleep(0)  # a prompt may have hundreds of parts: other calls proceed in between
            arrival = self._earlier.popleft()
            self._unread -= len(arrival.ids)
            return arrival  # it stays ready: more may follow; if not, the next arrival is empty
        self._ready = False
        ids, scores = self._ids, self._scores
        self._ids, self._scores = [], []
        if ids:
            self._first = False
            self._unread -= len(ids)
        if self._error is not None:
            if not ids:
                raise self._error
            self._ready = True
            return Arrival(ids, scores, None)
        return Arrival(ids, scores, self._end)

    def flush(self) -> None:
        """Let the reader take what there is, without waiting for more."""
        self._ready = True
        self.gathered_at = -math.inf
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():  # its reader was cancelled
                waiter.set_result(None)
