"""The queue and what is told of it: how many wait, how long each waited, and what became of it."""

from __future__ import annotations

import time

from opentelemetry import metrics, trace

from headrace import attributes
from headrace.batcher.job import Job
from headrace.batcher.waiting.queue import JobQueue

_tracer = trace.get_tracer("headrace.batcher")
_meter = metrics.get_meter("headrace.batcher")
queue_depth = _meter.create_up_down_counter(
    attributes.METRIC_QUEUE_DEPTH, description="requests that wait for a worker, or to be tokenised before"
)
queue_wait = _meter.create_histogram(
    attributes.METRIC_QUEUE_WAIT, unit="s", explicit_bucket_boundaries_advisory=attributes.BUCKETS_TTFT
)


class Line:
    """Jobs come and go by here, so that spans and metrics miss none; who is next is asked of *queue*."""

    def __init__(self, queue: JobQueue[Job], labels: dict[str, str]) -> None:
        self.queue = queue
        self._labels = {**labels, attributes.QUEUE_STAGE: "worker"}

    @property
    def waiting(self) -> int:
        """How many have a place that the limit is for."""
        return self.queue.waiting

    def put(self, job: Job) -> None:
        """A new job waits."""
        self._enter(job)
        self.queue.put(job)

    def put_back(self, job: Job) -> None:
        """An answer that had begun waits to go on."""
        self._enter(job)
        self.queue.put_back(job)

    def remove(self, job: Job, outcome: str) -> bool:
        """A job waits no more, for this reason; false if it did not wait."""
        if not self.queue.discard(job):
            return False
        self.left(job, outcome)
        return True

    def left(self, job: Job, outcome: str) -> None:
        """Book a job that `queue.take` removed."""
        queue_depth.add(-1, self._labels)
        queue_wait.record(time.monotonic() - job.queued, {**self._labels, attributes.OUTCOME: outcome})
        job.queue_span.set_attribute(attributes.OUTCOME, outcome)
        job.queue_span.end()

    def _enter(self, job: Job) -> None:
        queue_depth.add(1, self._labels)
        job.queued = time.monotonic()
        job.queue_span = _tracer.start_span(
            attributes.SPAN_QUEUE, context=trace.set_span_in_context(job.span)
        )
