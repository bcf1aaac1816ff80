"""Decide who may wait: nobody who cannot be served in time, and not more than there is room for.

Judged from what is measured: how fast the workers compute prompts and take steps, and how fast the queue
drains.
"""

from __future__ import annotations

from typing import Any, Protocol

from headrace import errors
from headrace.batcher.job import Job
from headrace.batcher.links.pool import WorkerPool
from headrace.batcher.waiting.estimates import Arrivals, Mean, Pace, retry_after
from headrace.batcher.waiting.line import Line
from headrace.batcher.waiting.prefixes import Prefixes
from headrace.batcher.waiting.queue import JobQueue, Waiting, victims
from headrace.runtime.rate import RateMeter

# What is measured in trouble, such as the loss of a worker, looks worse than it will be: a request is refused
# only if it would take this many times as long as it has.
DOUBT = 2.0


class Places(Protocol):
    """Somewhere that requests wait, each with a place of the batcher's `queue_limit`."""

    @property
    def queue(self) -> JobQueue[Any]:
        """Those that can be asked to give their place to another one."""
        ...

    @property
    def waiting(self) -> int:
        """How many places are taken."""
        ...

    def remove(self, waiting: Any, outcome: str) -> bool:
        """Take the place away from one in the queue; false if it is not there."""
        ...


class Admission:
    """Lets jobs into the line, or raises NoWorkers, Overloaded or Unattainable.

    places     where requests wait: the line, and before it the intake, which adds its own
    arrivals   how often requests come
    drained    counts the jobs that leave the queue for a worker
    answers    mean length of answers that ended, in tokens
    """

    def __init__(self, line: Line, pool: WorkerPool, prefixes: Prefixes) -> None:
        self.places: list[Places] = [line]
        self.arrivals = Arrivals()
        self.drained = RateMeter()
        self.answers = Mean()
        self._line = line
        self._pool = pool
        self._prefixes = prefixes

    def admit(self, job: Job, now: float) -> None:
        """Put *job* in line. One that has no place yet takes another one's if there is none left.

        Raises what is said above.
        """
        if not self._pool.ready():
            raise errors.NoWorkers(
                f"no worker of this tier is ready ({self._pool.problem}); try again shortly", retry_after=1.0
            )
        self.arrivals.add(now)
        wanted = max(job.sampling.max_tokens - job.answered, 1)
        job.cost = job.tokens + min(wanted, int(self.answers.value) or wanted)
        held = max(self._prefixes.held(job.blocks, link.target) for link in self._pool.ready())
        job.uncached = max(job.tokens - held, 1)
        self._check_deadline(job, now)
        if job.leave_intake is None:
            self.make_place(job, now)
        else:
            job.leave_intake()
        self._line.put(job)

    def _check_deadline(self, job: Job, now: float) -> None:
        """Raise Unattainable if the job cannot be served in time, by what is measured."""
        if job.answer_by is None:
            return
        pace = self.pace(now)
        jobs, ahead = self._line.queue.ahead_of(job)
        left = job.answer_by - now
        first = pace.first_token_in(jobs=jobs, ahead=ahead, tokens=job.uncached)
        last = first + pace.tokens_in(job.least_tokens - job.answered)
        if last > DOUBT * left:
            what = "its first token" if first > left else f"its {job.least_tokens} tokens"
            raise errors.Unattainable(
                f"the deadline is in {left:.2f} s and {what} cannot come before {max(first, last):.2f} s, as "
                f"{jobs} requests stand before it: give it more time, or another tier",
                left=f"{left:.3f}",
                needed=f"{last:.3f}",
            )

    def make_place(self, newcomer: Waiting, now: float) -> None:
        """See to it that *newcomer* finds a place among those that wait. Raises Overloaded.

        What workers have room for needs no place: it is on its way to them.
        """
        queued, limit = sum(place.waiting for place in self.places), self._line.queue.limit
        room = sum(max(link.room(now), 0) for link in self._pool) - len(self._line.queue.begun)
        full = queued >= limit + max(room, 0)
        given = victims([place.queue for place in self.places], newcomer, needed=int(full))
        delay = retry_after(queued, self.drained.per_second(now))
        if given is None:
            raise errors.Overloaded(
                f"the queue is full ({limit} requests wait); retry after {delay:.1f} s",
                retry_after=delay,
                queued=queued,
                limit=limit,
            )
        for victim in given:
            self.shed(
                victim,
                errors.Shed(
                    "the queue is full and this request gave its place to one of higher priority, or of a "
                    f"tenant that has fewer; retry after {delay:.1f} s",
                    retry_after=delay,
                    queued=queued,
                    limit=limit,
                ),
            )

    def shed(self, victim: Any, error: errors.Shed) -> None:
        """End one that waits, for the sake of another one."""
        any(place.remove(victim, "shed") for place in self.places)
        victim.fail(error)

    def pace(self, now: float) -> Pace:
        """How fast the tier is, as measured."""
        ready = self._pool.ready()
        steps = [link.load.step_time.ToNanoseconds() / 1e9 for link in ready]
        busy = not any(link.room(now) for link in ready)
        return Pace(
            prefill=sum(link.load.prefill_tokens_per_second for link in ready),
            step_seconds=min(steps, default=0.0),
            backlog=sum(link.backlog for link in ready),
            drained=self.drained.per_second(now) if busy else 0.0,
        )
