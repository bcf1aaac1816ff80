"""Run the life of a request: wait in the queue, run at workers through failures and pauses, and end.

This is the one place of the batcher where requests wait. Decisions are made in plain modules: which request
may wait (`admission`), which is next (`order`), what is sent where and when (`dispatch`), and what follows
the loss of a worker (`failover`). `pool` keeps a `link` to each worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from headrace import errors
from headrace.batcher.inbox import Arrival, SequenceEnd
from headrace.batcher.job import Job
from headrace.batcher.links.failover import check_retry
from headrace.batcher.links.link import WorkerLink
from headrace.batcher.links.pool import WorkerPool
from headrace.batcher.waiting.admission import Admission
from headrace.batcher.waiting.dispatch import MAX_IDLE_SECONDS, Dispatcher
from headrace.batcher.waiting.prefixes import PrefixIndex, scope_of, scoped
from headrace.batcher.waiting.prompt_details import PromptDetailsMemory
from headrace.batcher.waiting.queue import RequestQueue
from headrace.batcher.waiting.window import Window
from headrace.flushing import LiveFlushing
from headrace.metrics import catalogue
from headrace.metrics.rare import create_for_batcher
from headrace.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)


class Coalescer:
    """Admits jobs, batches them, hides the loss of workers, and delivers the tokens of each.

    pool                the workers of this tier; the caller runs it
    failover_seconds    how long requests wait while no worker is ready
    max_unread_seconds  how long an answer stays paused for a slow reader before its call is ended
    share_prefixes      whether tenants share cached prefixes

    An answer whose inbox is full is paused: it is cancelled at its worker, which continues with others, and
    resumed from its next token when the reader has caught up.
    """

    def __init__(
        self,
        pool: WorkerPool,
        queue: RequestQueue,
        window: Window,
        *,
        tier: str,
        failover_seconds: float = 30.0,
        max_unread_seconds: float = 30.0,
        share_prefixes: bool = False,
    ) -> None:
        self.pool = pool
        self.queue = queue
        self.prefixes = PrefixIndex()
        self.live: set[Job] = set()
        self.paused: set[Job] = set()
        self._flushing = LiveFlushing()
        self.admission = Admission(queue, pool, self.prefixes)
        self._prompt_details = PromptDetailsMemory()
        self._tier = tier
        create_for_batcher(tier)
        self._dispatcher = Dispatcher(queue, pool, window, self.prefixes, self.admission, tier)
        self._failover_seconds = failover_seconds
        self._max_unread_seconds = max_unread_seconds
        self._share_prefixes = share_prefixes
        self._wakeup: asyncio.Future[None] | None = None  # of `run`, while it waits
        self._unready_since: float | None = time.monotonic()  # None while a worker is ready
        self._stopping = False

    @contextmanager
    def admitted(self, job: Job) -> Iterator[None]:
        """Queue *job*; on leaving the block, cancel it unless it has ended.

        Raises NoWorkers, Overloaded, TtftUnattainable or DeadlineUnattainable immediately.
        """
        if self._stopping:
            raise errors.Draining("this batcher is stopping; try again", retry_after=0.2)
        if not self._share_prefixes and job.tenant:
            job.scope = scope_of(job.tenant)
            job.blocks = scoped(job.blocks, job.scope)
        with self._prompt_details.held(job):
            self.admission.admit(job, time.monotonic())
            self._wake()
            self.live.add(job)
            try:
                yield
            finally:
                self.live.discard(job)
                self.paused.discard(job)
                if not self.queue.remove(job, "cancelled"):
                    any(link.cancel(job) for link in self.pool)

    async def take(self, job: Job) -> Arrival:
        """Wait for the next arrival of an admitted job; the last one has an end.

        Raises Shed, DeadlineInQueue, DeadlineInDecode, or the failure that failover could not hide.
        """
        arrival = await job.inbox.take()
        if arrival.end is not None and arrival.end.reason == pb.FINISH_REASON_DEADLINE:
            raise job.deadline_error()
        if job in self.paused and job.inbox.caught_up:
            self._unpause(job)
        return arrival

    async def run(self) -> None:
        """Form batches until cancelled; then fail every job that is left."""
        loop, pool = asyncio.get_running_loop(), self.pool
        ready = catalogue.WORKERS.of(tier=self._tier, state="ready")
        others = catalogue.WORKERS.of(tier=self._tier, state="not_ready")
        try:
            with (
                ready.reading(lambda: len(pool.ready())),
                others.reading(lambda: len(pool) - len(pool.ready())),
            ):
                while True:
                    self._wakeup = loop.create_future()
                    timer = loop.call_later(self._dispatch(time.monotonic()), self._wake)
                    try:
                        await self._wakeup
                    finally:
                        timer.cancel()
        finally:
            self.stop()

    def _wake(self) -> None:
        """Dispatch in the next turn of the event loop, with all that changes in this one."""
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def stop(self) -> None:
        """Fail all jobs with Draining, so that callers resume on another batcher."""
        self._stopping = True
        for job in list(self.live):
            self.queue.remove(job, "refused")
            for link in self.pool:
                link.cancel(job)
            job.inbox.fail(_stopping())

    def current_flushing(self, now: float) -> LiveFlushing:
        """Return the flushers, adapted to the load if that was some time ago."""
        if self._flushing.is_due(now):
            rate = sum(link.rate.per_second(now) for link in self.pool)
            self._flushing.update(now, streams=len(self.live), tokens_per_second=rate)
        return self._flushing

    # The events of links, see `listener.LinkListener`.

    def changed(self) -> None:
        """See `LinkListener`."""
        # Otherwise there is nothing to dispatch, to evict or to notice.
        if self.queue or self._unready_since is not None or any(link.suspect for link in self.pool):
            self._wake()

    def stepped(self, now: float) -> None:
        """See `LinkListener`."""
        self.current_flushing(now)

    def ended(self, link: WorkerLink, job: Job, end: SequenceEnd) -> None:
        """See `LinkListener`."""
        if end.reason == pb.FINISH_REASON_CANCELLED:  # not by this batcher: links do not report those
            self.failed(link, job, errors.WorkerDraining("the worker handed the request back"))
            return
        self.admission.answer_tokens.add(job.answer_length)
        job.history.cached = end.usage.cached_tokens
        job.inbox.end(end)

    def failed(self, link: WorkerLink, job: Job, error: errors.HeadraceError) -> None:
        """See `LinkListener`."""
        if job not in self.live or job.inbox.closed:
            return
        try:
            if self._stopping:
                raise _stopping()
            alive = {(one.target, one.incarnation) for one in self.pool if one.ready and one is not link}
            check_retry(job, error, alive)
            job.history.lost_at = time.monotonic()
        except errors.HeadraceError as final:
            job.inbox.fail(final)
            return
        log.info("answer will be resumed", extra={"reason": error.reason, "tokens": job.answer_length})
        catalogue.FAILOVERS.of(tier=self._tier, error=error.reason).add()
        if job.inbox.full:
            self._pause(job)
        else:
            self._resume(job)

    def prefilled(self, link: WorkerLink, job: Job, cached: int, *, used_cache: bool) -> None:
        """See `LinkListener`."""
        # Without use of the cache, few cached tokens are no sign that it has evicted some.
        grain = link.shared_block_tokens if used_cache else 0
        self.prefixes.record_prefill(job.blocks, link.target, cached, grain)
        if job in link.in_flight:
            job.history.cached = min(cached, len(job.prompt_ids))

    def inbox_full(self, link: WorkerLink, job: Job) -> None:
        """See `LinkListener`."""
        link.cancel(job)
        job.history.reason = errors.SlowReader.reason
        self._pause(job)

    def dropped(self, job: Job, tokens: int) -> None:
        """See `LinkListener`."""
        cause = job.history.waste_cause
        if job in self.live:  # it continues elsewhere, or later
            slow = job.inbox.full or job.history.reason == errors.SlowReader.reason
            cause = "slow_reader" if slow else "failover"
        catalogue.WASTED_TOKENS.of(tier=self._tier, cause=cause).add(tokens)

    def cache_lost(self, link: WorkerLink) -> None:
        """See `LinkListener`."""
        self.prefixes.forget(link.target)

    # Interrupted answers.

    def _resume(self, job: Job) -> None:
        """Put an interrupted answer back into the queue; the next suitable worker resumes it."""
        job.attempt += 1
        if job.answer_length >= job.sampling.max_tokens:  # only the message that it is complete was lost
            job.inbox.end(SequenceEnd(pb.FINISH_REASON_LENGTH, pb.Usage(), pb.Timing()))
            return
        self.queue.put_back(job)
        self._wake()

    def _pause(self, job: Job) -> None:
        """Keep an answer without a worker until its reader has caught up, or has been behind for too long."""
        self.paused.add(job)
        catalogue.PAUSED.of(tier=self._tier).add()
        job.pause_until(time.monotonic() + self._max_unread_seconds)

    def _unpause(self, job: Job) -> None:
        self.paused.discard(job)
        job.pause_until(None)
        if not job.inbox.closed:
            self._resume(job)

    # Dispatch, and workers that are suspect or lost.

    def _dispatch(self, now: float) -> float:
        """Evict jobs from suspect workers and submit batches. Returns the seconds until the next call."""
        if self.pool.ready():
            self._unready_since = None
        else:
            self._unready_since = now if self._unready_since is None else self._unready_since
            if now - self._unready_since >= self._failover_seconds:
                self._fail_waiting()
        self._evict(now)
        return min(self._dispatcher.dispatch(now), MAX_IDLE_SECONDS)

    def _evict(self, now: float) -> None:
        """Take sequences away from suspect workers, as far as other workers have free slots for them."""
        suspects = [link for link in self.pool if link.suspect]
        if not suspects:
            return
        free = sum(link.free_slots(now) for link in self.pool) - len(self.queue.interrupted)
        for link in suspects:
            for job in link.in_flight.jobs()[: max(free, 0)]:
                free -= 1
                link.cancel(job)
                self.failed(link, job, errors.WorkerLost(f"the worker at {link.target} makes no steps"))

    def _fail_waiting(self) -> None:
        """Fail all jobs in the queue, because no worker came back in time."""
        for job in list(self.queue):
            self.queue.remove(job, "failed")
            error = errors.WorkerLost if job.started else errors.NoWorkers
            job.inbox.fail(
                error(
                    f"no worker was ready for {self._failover_seconds:g} s ({self.pool.problem})",
                    retry_after=1.0,
                )
            )


def _stopping() -> errors.Draining:
    return errors.Draining("this batcher is stopping; resume on another one", retry_after=0.2)
