"""Wait for requests and for room at the workers, and bring them together in batches.

The one place of the batcher where requests wait. What it decides is decided elsewhere: how many may
wait (`queue`), when a batch is complete (`window`), what text the tokens are (`detokenizer`). The
workers' streams are `workers`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from opentelemetry import metrics, trace

from headrace import attributes, errors
from headrace.batcher.job import Arrival, Job
from headrace.batcher.queue import JobQueue
from headrace.batcher.window import Window
from headrace.batcher.workers import WorkerLink
from headrace.v1 import generation_pb2 as pb

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


class Coalescer:
    """Admits jobs, batches them, and hands each its tokens.

    links    the workers of this tier; `run` of each belongs to whoever made them
    """

    def __init__(self, links: Sequence[WorkerLink], queue: JobQueue, window: Window, *, tier: str) -> None:
        self._links = links
        self._queue = queue
        self._window = window
        self._labels = {attributes.TIER: tier}
        self._changed = asyncio.Event()
        self.live = 0
        for link in links:
            link.on_change = self._changed.set

    @property
    def queue(self) -> JobQueue:
        """Who waits."""
        return self._queue

    @property
    def links(self) -> Sequence[WorkerLink]:
        """The workers' streams, connected or not."""
        return self._links

    def workers(self) -> list[WorkerLink]:
        """The workers that take work."""
        return [link for link in self._links if link.ready]

    async def arrivals(self, job: Job) -> AsyncGenerator[Arrival, None]:
        """Queue *job* and yield what comes of it; the first item is empty and says that it has a place.

        The last item has an end. Leaving early cancels the job wherever it is. Raises NoWorkers or
        Overloaded at once, DeadlineInQueue or DeadlineInDecode, and whatever the worker reports.
        """
        self._admit(job)
        self.live += 1
        ended = False
        try:
            yield Arrival([], [], None)
            while not ended:
                try:
                    async with asyncio.timeout_at(job.answer_by):
                        arrival = await job.inbox.take()
                except TimeoutError:
                    raise job.deadline_error() from None
                except errors.HeadraceError:
                    ended = True
                    raise
                if arrival.end is not None:
                    ended = True
                    if arrival.end.reason == pb.FINISH_REASON_DEADLINE:
                        raise job.deadline_error()
                    if arrival.end.reason == pb.FINISH_REASON_CANCELLED:
                        raise errors.WorkerDraining("the worker gave the request back; try again")
                yield arrival
        finally:
            self.live -= 1
            if self._queue.discard(job):
                self._leave_queue(job, "left")
            elif not ended:
                self._cancel(job)

    async def run(self) -> None:
        """Form batches until cancelled; then answer every job that still waits."""
        try:
            while True:
                self._changed.clear()
                wait = self._dispatch()
                try:
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            for job in self._queue.take(len(self._queue)):
                self._leave_queue(job, "refused")
                job.inbox.fail(errors.Draining("this batcher is stopping; try again", retry_after=0.2))

    def _admit(self, job: Job) -> None:
        if not any(link.ready for link in self._links):
            raise errors.NoWorkers(
                "no worker of this tier is connected and ready; try again shortly", retry_after=1.0
            )
        self._queue.put(job, retry_after=max(0.1, self._queue.oldest_wait(time.monotonic())))
        _queue_depth.add(1, self._labels)
        job.queue_span = _tracer.start_span(
            attributes.SPAN_QUEUE, context=trace.set_span_in_context(job.span)
        )
        self._changed.set()

    def _dispatch(self) -> float | None:
        """Send every batch that is complete; returns seconds until the next one is, None for never."""
        while self._queue:
            link = max(self.workers(), key=lambda link: link.room, default=None)
            if link is None or link.room <= 0:
                return None
            lengths = [job.tokens for job in self._queue]
            now = time.monotonic()
            closes = self._window.closes(
                lengths,
                link.room,
                oldest=next(iter(self._queue)).arrived,
                worker_idle=link.outstanding == 0,
            )
            if closes > now:
                return closes - now
            self._submit(link, self._queue.take(self._window.count(lengths, link.room)), now)
        return None

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
            job.submitted = now
            job.span.add_link(span.get_span_context())
            self._leave_queue(job, "submitted")
        _batch_size.record(len(batch), self._labels)
        span.set_attribute(attributes.BATCH_ID, link.submit(batch, span, now))
        span.end()

    def _leave_queue(self, job: Job, outcome: str) -> None:
        wait = time.monotonic() - job.arrived
        _queue_depth.add(-1, self._labels)
        _queue_wait.record(wait, {**self._labels, attributes.OUTCOME: outcome})
        job.queue_span.set_attribute(attributes.OUTCOME, outcome)
        job.queue_span.end()

    def _cancel(self, job: Job) -> None:
        for link in self._links:
            if link.cancel(job):
                return
