"""Wait for requests and for room at the workers, and bring them together in batches.

The one place of the batcher where requests wait. What it decides is decided elsewhere: who is next and
who must go (`queue`), when a batch is complete (`window`), which worker it goes to (`placement`), what
follows the loss of one (`failover`). The workers' streams are `workers`, and `pool` keeps them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from opentelemetry import metrics, trace

from headrace import attributes, errors
from headrace.batcher import failover, placement
from headrace.batcher.inbox import Arrival, End, Move
from headrace.batcher.job import Job
from headrace.batcher.pace import Arrivals, Mean, Pace, retry_after
from headrace.batcher.pool import WorkerPool
from headrace.batcher.prefixes import Prefixes
from headrace.batcher.queue import JobQueue
from headrace.batcher.window import Window
from headrace.batcher.workers import WorkerLink
from headrace.runtime.rate import RateMeter
from headrace.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)

_tracer = trace.get_tracer("headrace.batcher")
_meter = metrics.get_meter("headrace.batcher")
_queue_depth = _meter.create_up_down_counter(
    attributes.METRIC_QUEUE_DEPTH, description="requests that wait for a worker"
)
_queue_wait = _meter.create_histogram(
    attributes.METRIC_QUEUE_WAIT, unit="s", explicit_bucket_boundaries_advisory=attributes.BUCKETS_TTFT
)
_batch_size = _meter.create_histogram(
    attributes.METRIC_BATCH_SIZE,
    description="sequences per batch",
    explicit_bucket_boundaries_advisory=attributes.BUCKETS_SIZE,
)
_failovers = _meter.create_counter(
    attributes.METRIC_FAILOVERS, description="answers that went on at another worker, by why they had to"
)
_paused = _meter.create_counter(
    attributes.METRIC_PAUSED,
    description="answers that were taken off their worker until their reader caught up",
)

# What is measured in trouble, such as the loss of a worker, looks worse than it will be: a request is refused
# only if it would take this many times as long as it has.
DOUBT = 2.0
_LOOK_SECONDS = 1.0  # the longest that `run` sleeps: breakers close, deadlines pass, workers stay away


class Coalescer:
    """Admits jobs, batches them, sees them through the loss of workers, and hands each its tokens.

    pool              the workers of this tier; `run` of it belongs to whoever made it
    failover_seconds  how long what waits may do so while no worker is ready at all
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
    ) -> None:
        self.pool = pool
        self.queue = queue
        self.prefixes = Prefixes()
        self.live: set[Job] = set()
        self.paused: set[Job] = set()
        self._window = window
        self._labels = {attributes.TIER: tier}
        self._failover_seconds = failover_seconds
        self._unread_seconds = unread_seconds
        self._changed = asyncio.Event()
        self._served = time.monotonic()  # when a worker was ready last
        self._stopping = False
        self._arrivals = Arrivals()
        self._drained = RateMeter()
        self._answers = Mean()

    async def arrivals(self, job: Job) -> AsyncGenerator[Arrival, None]:
        """Queue *job* and yield what comes of it; the first item is empty and says that it has a place.

        The last item has an end. Leaving early cancels the job wherever it is. Raises at once NoWorkers,
        Overloaded or Unattainable, later Shed, DeadlineInQueue or DeadlineInDecode, and whatever failover
        could not hide.
        """
        self._admit(job)
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
            if self.queue.discard(job):
                self._leave_queue(job, "left")
            else:
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
            if self.queue.discard(job):
                self._leave_queue(job, "refused")
            for link in self.pool:
                link.cancel(job)
            job.inbox.fail(errors.Draining("this batcher is stopping; carry on elsewhere", retry_after=0.2))

    def pace(self, now: float) -> Pace:
        """How fast the tier is, as measured."""
        ready = self.pool.ready()
        steps = [link.load.step_time.ToNanoseconds() / 1e9 for link in ready]
        busy = not any(link.room(now) for link in ready)
        return Pace(
            prefill=sum(link.load.prefill_tokens_per_second for link in ready),
            step_seconds=min(steps, default=0.0),
            backlog=sum(link.backlog for link in ready),
            drained=self._drained.per_second(now) if busy else 0.0,
        )

    # What links report.

    def changed(self) -> None:
        """See `workers.Sink`."""
        self._changed.set()

    def ended(self, link: WorkerLink, job: Job, end: End) -> None:
        """See `workers.Sink`."""
        if end.reason == pb.FINISH_REASON_CANCELLED:  # not by us: whoever we cancel is not reported
            self.failed(link, job, errors.WorkerDraining("the worker gave the request back"))
            return
        self._answers.add(job.answered)
        job.history.cached = end.usage.cached_tokens
        job.inbox.end(end)

    def failed(self, link: WorkerLink, job: Job, error: errors.HeadraceError) -> None:
        """See `workers.Sink`."""
        if job not in self.live or job.inbox.closed:
            return
        try:
            if self._stopping:
                raise errors.Draining("this batcher is stopping; carry on elsewhere", retry_after=0.2)
            alive = {(one.target, one.incarnation) for one in self.pool if one.ready and one is not link}
            failover.carry_on(job, error, alive)
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
        """See `workers.Sink`."""
        self.prefixes.computed(job.blocks, link.target, cached, link.shared_block_tokens)
        if job in link.flights:
            job.history.cached = min(cached, len(job.prompt_ids))

    def full(self, link: WorkerLink, job: Job) -> None:
        """See `workers.Sink`."""
        link.cancel(job)
        job.history.reason = errors.SlowReader.reason
        self._pause(job)

    def renewed(self, link: WorkerLink) -> None:
        """See `workers.Sink`."""
        self.prefixes.forget(link.target)

    # Answers that had begun.

    def _go_on(self, job: Job) -> None:
        """Have an answer carried on by the next worker that has room."""
        job.attempt += 1
        if job.answered >= job.sampling.max_tokens:  # only the word that it is complete was lost
            job.inbox.end(End(pb.FINISH_REASON_LENGTH, pb.Usage(), pb.Timing()))
            return
        self._enter_queue(job)
        self.queue.put_back(job)
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

    # Admission.

    def _admit(self, job: Job) -> None:
        now = time.monotonic()
        if self._stopping:
            raise errors.Draining("this batcher is stopping; try again", retry_after=0.2)
        if not self.pool.ready():
            raise errors.NoWorkers(
                f"no worker of this tier is ready ({self.pool.problem}); try again shortly", retry_after=1.0
            )
        self._arrivals.add(now)
        wanted = max(job.sampling.max_tokens - job.answered, 1)
        job.cost = job.tokens + min(wanted, int(self._answers.value) or wanted)
        held = max(self.prefixes.held(job.blocks, link.target) for link in self.pool.ready())
        job.uncached = max(job.tokens - held, 1)
        self._check_deadline(job, now)
        if self.queue.full:
            self._make_place(job, now)
        self._enter_queue(job)
        self.queue.put(job)
        self._changed.set()

    def _check_deadline(self, job: Job, now: float) -> None:
        """Raise Unattainable if the job cannot be served in time, by what is measured."""
        if job.answer_by is None:
            return
        pace = self.pace(now)
        jobs, ahead = self.queue.ahead_of(job)
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

    def _make_place(self, job: Job, now: float) -> None:
        delay = retry_after(len(self.queue), self._drained.per_second(now))
        queued, limit = len(self.queue), self.queue.limit
        victim = self.queue.victim(job)
        if victim is None:
            raise errors.Overloaded(
                f"the queue is full ({self.queue.limit} requests wait); retry after {delay:.1f} s",
                retry_after=delay,
                queued=queued,
                limit=limit,
            )
        self.queue.discard(victim)
        self._leave_queue(victim, "shed")
        victim.inbox.fail(
            errors.Shed(
                "the queue is full and this request gave its place to one of higher priority, or of a tenant "
                f"that has fewer; retry after {delay:.1f} s",
                retry_after=delay,
                queued=queued,
                limit=limit,
            )
        )

    # Dispatch.

    def _turn(self, now: float) -> float:
        """Move what has to move and send what can go; returns seconds until the next look."""
        if self.pool.ready():
            self._served = now
        elif now - self._served > self._failover_seconds:
            self._give_up()
        self._evict()
        return min(self._dispatch(now), _LOOK_SECONDS)

    def _dispatch(self, now: float) -> float:
        """Send every batch that is complete; returns seconds until the next one is."""
        if not self.queue:
            return _LOOK_SECONDS
        candidates = self._candidates(now)
        if not candidates:
            return _LOOK_SECONDS
        begun = self.queue.begun
        if not begun and (closes := self._closes(candidates)) > now:
            return closes - now
        batches: dict[str, list[Job]] = {}
        for job in begun:
            self._place(job, candidates, batches)
        while (head := self.queue.head(now)) is not None and self._place(head, candidates, batches):
            pass
        for link in self.pool:
            if link.target in batches:
                self._submit(link, batches[link.target], now)
        # Whoever got a full batch may take another at once.
        full = any(len(batch) >= self._window.size for batch in batches.values())
        return 0.0 if self.queue and full else _LOOK_SECONDS

    def _place(
        self, job: Job, candidates: dict[str, placement.Candidate], batches: dict[str, list[Job]]
    ) -> bool:
        """Take a job from the queue into the batch of the worker that suits it; false if none does now."""
        probation = failover.on_probation(job)
        chosen = placement.choose(
            (replace(one, held=self.prefixes.held(job.blocks, one.name)) for one in candidates.values()),
            job.tokens,
            avoid=failover.avoided(job),
            kind=job.history.kind if job.answered else "",
            probation=probation,
        )
        if chosen is None:
            return False
        self.queue.take(job)
        batch = batches.setdefault(chosen.name, [])
        batch.append(job)
        job.uncached = max(job.tokens - chosen.held, 1)
        if chosen.shares:
            self.prefixes.expect(job.blocks, chosen.name)
        if chosen.room == 1 or len(batch) >= self._window.size:
            del candidates[chosen.name]
        else:
            candidates[chosen.name] = replace(
                chosen,
                room=chosen.room - 1,
                sequences=chosen.sequences + 1,
                backlog=chosen.backlog + job.uncached,
                held=0,
                probation=chosen.probation or probation,
            )
        return True

    def _candidates(self, now: float) -> dict[str, placement.Candidate]:
        return {
            link.target: placement.Candidate(
                name=link.target,
                room=room,
                sequences=link.outstanding,
                backlog=link.backlog,
                budget=self._window.budget(link.load.prefill_tokens_per_second),
                rate=link.load.prefill_tokens_per_second,
                kind=link.kind,
                probation=any(failover.on_probation(job) for job in link.flights.jobs()),
                shares=link.shared_block_tokens > 0,
            )
            for link in self.pool
            if (room := link.room(now)) > 0
        }

    def _closes(self, candidates: dict[str, placement.Candidate]) -> float:
        waiting = list(self.queue)
        steps = [link.load.step_time.ToNanoseconds() / 1e9 for link in self.pool.ready()]
        now = time.monotonic()
        return self._window.closes(
            len(waiting),
            sum(job.uncached for job in waiting),
            sum(candidate.room for candidate in candidates.values()),
            oldest=min(job.arrived for job in waiting),
            linger=self._window.linger_for(
                arrivals=self._arrivals.per_second(now), step_seconds=min(steps, default=0.0)
            ),
            hungry=any(candidate.backlog == 0 for candidate in candidates.values()),
        )

    def _submit(self, link: WorkerLink, batch: list[Job], now: float) -> None:
        span = _tracer.start_span(
            attributes.SPAN_BATCH,
            context=trace.set_span_in_context(trace.INVALID_SPAN),  # a root: it has many parents
            links=[trace.Link(job.span.get_span_context()) for job in batch],
            attributes={
                attributes.BATCH_SIZE: len(batch),
                attributes.BATCH_TOKENS: sum(job.tokens for job in batch),
                attributes.WORKER: link.worker_id,
                **self._labels,
            },
        )
        for job in batch:
            history = job.history
            if job.begun and job.tells_moves:
                job.inbox.move(Move(history.worker, link.worker_id, history.reason, job.attempt))
            job.submitted = now if job.submitted is None else job.submitted
            history.worker, history.address, history.kind = link.worker_id, link.target, link.kind
            history.incarnation = link.incarnation
            history.started_at = job.answered
            history.replayed += job.answered
            job.span.add_link(span.get_span_context())
            self._leave_queue(job, "submitted")
        self._drained.add(now, len(batch))
        _batch_size.record(len(batch), self._labels)
        span.set_attribute(attributes.BATCH_ID, link.submit(batch, span, now))
        span.end()

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
            self.queue.discard(job)
            self._leave_queue(job, "no workers")
            error = errors.WorkerLost if job.begun else errors.NoWorkers
            job.inbox.fail(
                error(
                    f"no worker was ready for {self._failover_seconds:g} s ({self.pool.problem})",
                    retry_after=1.0,
                )
            )

    def _enter_queue(self, job: Job) -> None:
        _queue_depth.add(1, self._labels)
        job.queued = time.monotonic()
        job.queue_span = _tracer.start_span(
            attributes.SPAN_QUEUE, context=trace.set_span_in_context(job.span)
        )

    def _leave_queue(self, job: Job, outcome: str) -> None:
        _queue_depth.add(-1, self._labels)
        _queue_wait.record(time.monotonic() - job.queued, {**self._labels, attributes.OUTCOME: outcome})
        job.queue_span.set_attribute(attributes.OUTCOME, outcome)
        job.queue_span.end()
