"""One request inside the batcher, and the way its tokens take to the one who waits for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from opentelemetry import trace

from headrace import errors
from headrace.v1 import generation_pb2 as pb

FLUSH_SECONDS = 0.1
# Servers answer a deadline a moment before gRPC ends the call, so that the caller hears the reason.
DEADLINE_MARGIN = 0.02


@dataclass(frozen=True, slots=True)
class Flush:
    """How tokens are gathered into one message.

    tokens    as many, or
    seconds   until the first of them has waited so long
    """

    tokens: int = 1
    seconds: float = FLUSH_SECONDS


def flush_for(streams: int) -> Flush:
    """Gather more, the more streams share this process: messages are what costs, not tokens.

    streams   answers under way. One event loop sends some thousand messages a second; a handful of
              readers get each token as it comes, hundreds get 8 at a time.
    """
    if streams <= 16:
        return Flush(1)
    return Flush(2 if streams <= 32 else 4 if streams <= 64 else 8)


@dataclass(frozen=True, slots=True)
class End:
    """How a sequence ended at the worker.

    reason    STOP, LENGTH, CANCELLED or DEADLINE
    """

    reason: pb.FinishReason.ValueType
    usage: pb.Usage
    timing: pb.Timing


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that came in, and the end if it came."""

    ids: list[int]
    logprobs: list[float]
    end: End | None


class Inbox:
    """Tokens of one sequence, between the worker's frames and the caller's stream.

    The first token wakes the reader at once; later ones gather as `flush` says. Bounded by the
    sequence's max_tokens. One reader, same event loop.
    """

    def __init__(self, flush: Flush) -> None:
        self.flush = flush
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._end: End | None = None
        self._error: errors.HeadraceError | None = None
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._first = True

    def put(self, ids: list[int], logprobs: list[float]) -> None:
        """More tokens."""
        self._ids += ids
        self._logprobs += logprobs
        if self._first or len(self._ids) >= self.flush.tokens:
            self._wake()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.flush.seconds, self._wake)

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
        self._first = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ids, logprobs = self._ids, self._logprobs
        self._ids, self._logprobs = [], []
        if self._error is not None:
            if not ids:
                raise self._error
            self._ready.set()
            return Arrival(ids, logprobs, None)
        return Arrival(ids, logprobs, self._end)

    def _wake(self) -> None:
        self._ready.set()


@dataclass(slots=True, eq=False)
class Job:
    """A request that passed all checks.

    sampling   with seed and max_tokens set
    arrived    time.monotonic() at the batcher
    expires    time.monotonic() of the deadline, None for never
    span       the request's server span: parent of what workers do for it
    """

    request_id: str
    prompt_ids: list[int]
    resume_ids: list[int]
    sampling: pb.Sampling
    arrived: float
    expires: float | None
    priority: int
    attempt: int
    inbox: Inbox
    span: trace.Span
    queue_span: trace.Span = field(default=trace.INVALID_SPAN)
    submitted: float | None = None

    @property
    def answer_by(self) -> float | None:
        """When the caller has to hear that the deadline passed."""
        return None if self.expires is None else self.expires - DEADLINE_MARGIN

    def late(self, now: float) -> bool:
        """Whether it is too late for an answer."""
        return self.answer_by is not None and now >= self.answer_by

    def deadline_error(self) -> errors.DeadlineExceeded:
        """What to tell the caller when it is."""
        if self.submitted is None:
            return errors.DeadlineInQueue(
                "the deadline passed before a worker was free; nothing was generated"
            )
        return errors.DeadlineInDecode("the deadline passed before the answer was complete")

    @property
    def tokens(self) -> int:
        """What it costs to take in: prompt and replayed answer."""
        return len(self.prompt_ids) + len(self.resume_ids)
