"""One request inside the batcher: what it asks, what it has got so far, and who had it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from opentelemetry import trace

from headrace import errors
from headrace.batcher.inbox import Inbox
from headrace.v1 import generation_pb2 as pb

# Servers answer a deadline a moment before gRPC ends the call, so that the caller hears the reason.
DEADLINE_MARGIN = 0.02


def answer_by(expires: float | None) -> float | None:
    """When the caller must have the error that its deadline passed, on the clock of *expires*."""
    return None if expires is None else expires - DEADLINE_MARGIN


@dataclass(slots=True, eq=False)
class Job:
    """A request that passed all checks.

    resume_ids  tokens of the answer that came with the request
    sampling    with seed and max_tokens set
    arrived     time.monotonic() at the batcher
    expires     time.monotonic() of the deadline, None for never
    tenant      whom the request is accounted to; "" is the anonymous tenant
    cost        tokens that serving it is expected to take, prompt included
    uncached    of its tokens, those that the worker has to compute, as far as is known
    blocks      names of the prompt's blocks, for workers that hold them
    scope       whom it shares computed prefixes with, see `prefixes.scope_of`
    attempt     counts the tries of the request, over all batchers; deltas of other attempts do not count
    queued      time.monotonic() when it entered the queue last; submitted, when it first left for a worker
    span        the request's server span: parent of what workers do for it
    generated   tokens of the answer that workers of this batcher made; with `resume_ids` and the seed
                they are all that another worker needs to carry on
    patience    what ends the call of a reader that stays behind; armed while its answer is paused
    leave_intake   gives back the place among those that wait which it got when it arrived, for the one in the
                queue or for none; None: it has no place yet
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
    tenant: str = ""
    cost: int = 1
    uncached: int = 1
    blocks: tuple[int, ...] = ()
    scope: bytes = b""
    tells_moves: bool = False
    queue_span: trace.Span = field(default=trace.INVALID_SPAN)
    queued: float = 0.0
    submitted: float | None = None
    generated: list[int] = field(default_factory=list)
    patience: asyncio.Timeout | None = None
    leave_intake: Callable[[], None] | None = None
    history: History = field(default_factory=lambda: History())  # defined below

    @property
    def answer_by(self) -> float | None:
        """When the caller has to hear that the deadline passed."""
        return answer_by(self.expires)

    def late(self, now: float) -> bool:
        """Whether it is too late for an answer."""
        return self.answer_by is not None and now >= self.answer_by

    def fail(self, error: errors.HeadraceError) -> None:
        """End it with *error*."""
        self.inbox.fail(error)

    def deadline_error(self) -> errors.DeadlineExceeded:
        """What to tell the caller when it is."""
        if self.submitted is None:
            return errors.DeadlineInQueue(
                "the deadline passed before a worker was free; nothing was generated"
            )
        return errors.DeadlineInDecode("the deadline passed before the answer was complete")

    @property
    def answer_ids(self) -> list[int]:
        """The answer so far."""
        return [*self.resume_ids, *self.generated]

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.resume_ids) + len(self.generated)

    @property
    def tokens(self) -> int:
        """What it costs to take in: prompt and replayed answer."""
        return len(self.prompt_ids) + self.answered

    @property
    def least_tokens(self) -> int:
        """The fewest tokens that the answer can have."""
        sampling = self.sampling
        runs_on = sampling.ignore_eos and not sampling.stop_token_ids and not sampling.stop
        return max(sampling.max_tokens if runs_on else min(sampling.min_tokens, sampling.max_tokens), 1)

    @property
    def begun(self) -> bool:
        """Whether a worker had it before."""
        return self.submitted is not None


@dataclass(slots=True)
class History:
    """What became of a job's attempts at workers.

    worker          who had it last: name, address and incarnation
    kind            what it ran; an answer keeps to equal weights where it can
    reason          why it left there, as an error reason; empty while it is there
    losses          attempts that ended with their worker
    killed          workers, by address and incarnation, that it may have killed: lost one after the other,
                    before it showed a token there
    lost_at         when the last attempt ended badly, by the monotonic clock
    faults          attempts that ended in a fault of the engine
    started_at      tokens that the answer had when the attempt began
    cached          prompt tokens that the last worker to compute the prompt had already
    replayed        answer tokens that attempts had to take in again
    wasted          tokens that came from attempts that had been given up
    """

    worker: str = ""
    address: str = ""
    incarnation: int = 0
    kind: str = ""
    reason: str = ""
    losses: int = 0
    killed: list[tuple[str, int]] = field(default_factory=list)
    lost_at: float = 0.0
    faults: int = 0
    started_at: int = 0
    cached: int = 0
    replayed: int = 0
    wasted: int = 0
