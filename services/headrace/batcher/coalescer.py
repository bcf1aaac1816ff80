"""See requests through: into the line, to workers, past the loss of workers and slow readers, to their end.

The one place of the batcher where requests wait. What it decides is decided elsewhere: who may wait
(`admission`), who is next and who must go (`queue`), what goes where and when (`dispatch`), what follows the
loss of a worker (`failover`). The workers' streams are `workers`, and `pool` keeps them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

from opentelemetry import metrics

from headrace import attributes, errors
from headrace.batcher.inbox import Arrival, End
from headrace.batcher.job import Job
from headrace.batcher.links import failover
from headrace.batcher.links.link import WorkerLink
from headrace.batcher.links.pool import WorkerPool
from headrace.batcher.waiting.admission import Admission
from headrace.batcher.waiting.dispatch import LOOK_SECONDS, Dispatcher
from headrace.batcher.waiting.line import Line
from headrace.batcher.waiting.prefixes import Prefixes, scope_of, scoped
from headrace.batcher.waiting.queue import JobQueue
from headrace.batcher.waiting.window import Window
from headrace.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)

_meter = metrics.get_meter("headrace.batcher")
_failovers = _meter.create_counter(
    attributes.METRIC_FAILOVERS, description="answers that went on at another worker, by why they had to"
)
_paused = _meter.create_counter(
    attributes.METRIC_PAUSED,
    description="answers that were taken off their worker until their reader caught up",
)


class Coalescer:
    """Admits jobs, batches them, sees them through the loss of workers, and hands each its tokens.

    pool              the workers of this tier; `run` of it belongs to whoever made it
    failover_seconds  how long what waits may do so while no worker is ready at all
    share_prefixes    whether tenants share what workers have computed of equal prompts
    unread_seconds    how long an answer is paused for a reader that is behind, before its call is ended

    An answer whose inbox is full is paused: it is taken off its worker, which goes on with the others, and
    carried on from its next token when the reader has caught up.
    """

    def __init__(
        self,
        pool: WorkerPool,
        queue: JobQueue[Job],
        window: Window,
        *,
        tier: str,
        failover_seconds: float = 30.0,
        unread_seconds: float = 30.0,
        share_prefixes: bool = False,
    ) -> None:
        labels = {attributes.TIER: tier}
        self.pool = pool
        self.queue = queue
        self.prefixes = Prefixes()
        self.live: set[Job] = set()
        self.paused: set[Job] = set()
        self._line = Line(queue, labels)
        self.admission = Admission(self._line, pool, self.prefixes)
        self._dispatcher = Dispatcher(self._line, pool, window, self.prefixes, self.admission, labels)
        self._labels = labels
        self._failover_seconds = failover_seconds
        self._unread_seconds = unread_seconds
        self._share_prefixes = share_prefixes
        self._changed = asyncio.Event()
        self._served = time.monotonic()  # when a worker was ready last
        self._stopping = False

    async def arrivals(self, job: Job) -> AsyncGenerator[Arrival, None]:
        """Queue *job* and yield what comes of it; the first item is empty and says that it has a place.

        The last item has an end. Leaving early cancels the job wherever it is. Raises at once NoWorkers,
        Overloaded or Unattainable, later Shed, DeadlineInQueue or DeadlineInDecode, and whatever failover
        could not hide.
        """
        if self._stopping:
            raise errors.Draining("this batcher is stopping; try again", retry_after=0.2)
        if not self._share_prefixes:
            job.scope = scope_of(job.tenant)
            job.blocks = scoped(job.blocks, job.scope)
        now = time.monotonic()
        self.admission.admit(job, now)
        self._changed.set()
        self.live.add(job)
        ended = False
        try:
            yield Arrival([], [], None)
            while not ended:
                try:
                    async with asyncio.timeout_at(job.answer_by):
                        arrival = await job.inbox.take()
                except TimeoutError:
                    raise job.deadline_error() from None
                if arrival.end is not None:
                    ended = True
                    if arrival.end.reason == pb.FINISH_REASON_DEADLINE:
                        raise job.deadline_error()
                if job in self.paused and job.inbox.caught_up:
                    self._unpause(job)
                yield arrival
        finally:
            self.live.discard(job)
            self.paused.discard(job)
            if not self._line.remove(job, "left"):
                any(link.cancel(job) for link in self.pool)

    async def run(self) -> None:
        """Form batches until cancelled; then answer every job that is still here."""
        try:
            while True:
                self._changed.clear()
                wait = self._turn(time.monotonic())
                try:
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            self.hand_back()

    def hand_back(self) -> None:
        """End everything, so that callers carry on elsewhere."""
        self._stopping = True
        for job in list(self.live):
            self._line.remove(job, "refused")
            for link in self.pool:
                link.cancel(job)
            job.inbox.fail(errors.Draining("this batcher is stopping; carry on elsewhere", retry_after=0.2))

    # What links report.

    def changed(self) -> None:
        """See `sink.Sink`."""
        self._changed.set()

    def ended(self, link: WorkerLink, job: Job, end: End) -> None:
        """See `sink.Sink`."""
        if end.reason == pb.FINISH_REASON_CANCELLED:  # not by us: whoever we cancel is not reported
            self.failed(link, job, errors.WorkerDraining("the worker gave the request back"))
            return
        self.admission.answers.add(job.answered)
        job.history.cached = end.usage.cached_tokens
        job.inbox.end(end)

    def failed(self, link: WorkerLink, job: Job, error: errors.HeadraceError) -> None:
        """See `sink.Sink`."""
        if job not in self.live or job.inbox.closed:
            return
        try:
            if self._stopping:
                raise errors.Draining("this batcher is stopping; carry on elsewhere", retry_after=0.2)
            alive = {(one.target, one.incarnation) for one in self.pool if one.ready and one is not link}
            failover.carry_on(job, error, alive)
            job.history.lost_at = time.monotonic()
        except errors.HeadraceError as last:
            job.inbox.fail(last)
            return
        log.info("answer goes on", extra={"reason": error.reason, "tokens": job.answered})
        _failovers.add(1, {**self._labels, attributes.ERROR_TYPE: error.reason})
        if job.inbox.full:
            self._pause(job)
        else:
            self._go_on(job)

    def prefilled(self, link: WorkerLink, job: Job, cached: int) -> None:
        """See `sink.Sink`."""
        self.prefixes.computed(job.blocks, link.target, cached, link.shared_block_tokens)
        if job in link.flights:
            job.history.cached = min(cached, len(job.prompt_ids))

    def full(self, link: WorkerLink, job: Job) -> None:
        """See `sink.Sink`."""
        link.cancel(job)
        job.history.reason = errors.SlowReader.reason
        self._pause(job)

    def renewed(self, link: WorkerLink) -> None:
        """See `sink.Sink`."""
        self.prefixes.forget(link.target)

    # Answers that had begun.

    def _go_on(self, job: Job) -> None:
        """Have an answer carried on by the next worker that has room."""
        job.attempt += 1
        if job.answered >= job.sampling.max_tokens:  # only the word that it is complete was lost
            job.inbox.end(End(pb.FINISH_REASON_LENGTH, pb.Usage(), pb.Timing()))
            return
        self._line.put_back(job)
        self._changed.set()

    def _pause(self, job: Job) -> None:
        """Leave an answer as it is until its reader has caught up, or has been behind for too long."""
        self.paused.add(job)
        _paused.add(1, self._labels)
        if job.patience is not None:
            job.patience.reschedule(asyncio.get_running_loop().time() + self._unread_seconds)

    def _unpause(self, job: Job) -> None:
        self.paused.discard(job)
        if job.patience is not None:
            job.patience.reschedule(None)
        if not job.inbox.closed:
            self._go_on(job)

    # Workers that are suspect, or gone.

    def _turn(self, now: float) -> float:
        """Move what has to move and send what can go; returns seconds until the next look."""
        if self.pool.ready():
            self._served = now
        elif now - self._served > self._failover_seconds:
            self._give_up()
        self._evict()
        return min(self._dispatcher.dispatch(now), LOOK_SECONDS)

    def _evict(self) -> None:
        """Take what suspect workers have away from them, as far as others have room for it."""
        now = time.monotonic()
        room = sum(link.room(now) for link in self.pool) - len(self.queue.begun)
        for link in self.pool:
            if not link.suspect:
                continue
            for job in link.flights.jobs()[: max(room, 0)]:
                room -= 1
                link.cancel(job)
                self.failed(link, job, errors.WorkerLost(f"the worker at {link.target} makes no steps"))

    def _give_up(self) -> None:
        for job in list(self.queue):
            self._line.remove(job, "no workers")
            error = errors.WorkerLost if job.begun else errors.NoWorkers
            job.inbox.fail(
                error(
                    f"no worker was ready for {self._failover_seconds:g} s ({self.pool.problem})",
                    retry_after=1.0,
                )
            )
