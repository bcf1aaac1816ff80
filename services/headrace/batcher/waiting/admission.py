"""Decide whether a request may wait: only if its deadline can be met, and only as many as the limit allows.

Decisions use measurements: how fast workers compute prompts and steps, and how fast the queue drains.
"""

from __future__ import annotations

from typing import Any, Protocol

from headrace import errors
from headrace.batcher.job import Job
from headrace.batcher.links.pool import WorkerPool
from headrace.batcher.waiting.estimates import ArrivalRate, Estimates, RunningMean, retry_after
from headrace.batcher.waiting.order import Waiting
from headrace.batcher.waiting.prefixes import PrefixIndex
from headrace.batcher.waiting.queue import RequestQueue
from headrace.batcher.waiting.shedding import Sheddable, victims
from headrace.metrics.words import Outcome
from headrace.runtime.rate import RateMeter

# Measurements taken during a fault, such as the loss of a worker, are pessimistic. A request is rejected only
# if the estimate exceeds the remaining time by this factor.
TOLERANCE = 2.0


class WaitingPlace(Sheddable, Protocol):
    """A part of the batcher where requests wait: the queue, or a lane of the intake."""

    @property
    def waiting(self) -> int:
        """The number of requests that count against the batcher's `queue_limit`."""
        ...

    def remove(self, waiting: Any, outcome: Outcome) -> bool:
        """Remove a request. Returns False if it does not wait here."""
        ...


class Admission:
    """Admits jobs to the queue, or rejects them.

    places          where requests wait: the queue, and the lanes that the intake adds
    arrivals        the rate of requests
    drained         counts the jobs that leave the queue for a worker
    answer_tokens   mean length of completed answers, in tokens
    """

    def __init__(self, queue: RequestQueue, pool: WorkerPool, prefixes: PrefixIndex) -> None:
        self.places: list[WaitingPlace] = [queue]
        self.arrivals = ArrivalRate()
        self.drained = RateMeter()
        self.answer_tokens = RunningMean()
        self._queue = queue
        self._pool = pool
        self._prefixes = prefixes

    def admit(self, job: Job, now: float) -> None:
        """Add *job* to the queue. If no place is free and it holds none yet, another request may be shed.

        Raises NoWorkers, Overloaded, TtftUnattainable or DeadlineUnattainable.
        """
        ready = self._pool.ready()
        if not ready:
            raise errors.NoWorkers(
                f"no worker of this tier is ready ({self._pool.problem}); try again shortly", retry_after=1.0
            )
        self.arrivals.add(now)
        max_new = max(job.sampling.max_tokens - job.answer_length, 1)
        job.cost = job.prefill_tokens + min(max_new, int(self.answer_tokens.value) or max_new)
        cached = max(self._prefixes.cached_tokens(job.usable_blocks, link.target) for link in ready)
        job.uncached = max(job.prefill_tokens - cached, 1)
        self._check_deadline(job, now)
        if job.release_place is None:
            self.make_place(job, now)
        else:
            job.release_place()
        self._queue.put(job)

    def _check_deadline(self, job: Job, now: float) -> None:
        """Raise TtftUnattainable or DeadlineUnattainable if the estimates exceed the remaining time."""
        if not job.deadline.exists:
            return
        left = job.response_deadline.left(now)
        estimates = self.estimates(now)
        decode = estimates.decode_seconds(job.min_answer_tokens - job.answer_length)
        # With the whole queue ahead, which needs no search through it.
        longest = estimates.first_token_seconds(
            jobs=len(self._queue), ahead=self._queue.uncached, tokens=job.uncached
        )
        if longest + decode <= TOLERANCE * left:
            return
        jobs, ahead = self._queue.ahead_of(job)
        first = estimates.first_token_seconds(jobs=jobs, ahead=ahead, tokens=job.uncached)
        last = first + decode
        if first > TOLERANCE * left:
            raise errors.TtftUnattainable(
                f"the deadline is in {left:.2f} s, but the first token would take at least {first:.2f} s, "
                f"with {jobs} requests ahead in the queue: allow more time or use another tier",
                left=f"{left:.3f}",
                needed=f"{first:.3f}",
            )
        if last > TOLERANCE * left:
            raise errors.DeadlineUnattainable(
                f"the deadline is in {left:.2f} s, but {job.min_answer_tokens} tokens would take at least "
                f"{last:.2f} s, with {jobs} requests ahead in the queue: allow more time, ask for fewer "
                "tokens or use another tier",
                left=f"{left:.3f}",
                needed=f"{last:.3f}",
            )

    def make_place(self, newcomer: Waiting, now: float) -> None:
        """Make sure that *newcomer* has a place, by shedding another request if need be. Raises Overloaded.

        The free slots of workers extend the limit: requests for them leave the queue at once.
        """
        queued, limit = sum(place.waiting for place in self.places), self._queue.limit
        interrupted = len(self._queue) - self._queue.waiting
        free = sum(link.free_slots(now) for link in self._pool) - interrupted
        if queued < limit + max(free, 0):
            return
        chosen = victims(self.places, newcomer, needed=1)
        delay = retry_after(queued, self.drained.per_second(now))
        if chosen is None:
            raise errors.Overloaded(
                f"the queue is full ({limit} requests wait); retry after {delay:.1f} s",
                retry_after=delay,
                queued=queued,
                limit=limit,
            )
        for victim in chosen:
            self.shed(
                victim,
                errors.Shed(
                    "the queue is full, and this request was shed in favour of one of higher priority or of "
                    f"a tenant with fewer requests; retry after {delay:.1f} s",
                    retry_after=delay,
                    queued=queued,
                    limit=limit,
                ),
            )

    def shed(self, victim: Any, error: errors.Shed) -> None:
        """Remove a waiting request from its place, and fail it with *error*."""
        any(place.remove(victim, "refused") for place in self.places)
        victim.fail(error)

    def estimates(self, now: float) -> Estimates:
        """Return the measured rates and the backlog of the tier."""
        rate, backlog, busy = 0.0, 0, True
        for link in self._pool.ready():
            rate += link.load.prefill_tokens_per_second
            backlog += link.backlog
            busy = busy and not link.free_slots(now)
        return Estimates(
            prefill_rate=rate,
            step_seconds=self._pool.step_seconds(),
            backlog=backlog,
            drain_rate=self.drained.per_second(now) if busy else 0.0,
        )
