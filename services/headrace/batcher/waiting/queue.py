"""Hold the requests of a tier until a worker has a free slot, and record how long each waited.

`order` decides which request is next. Every request enters and leaves through `RequestQueue`, so that its
metrics and spans miss none.
"""

from __future__ import annotations

import time

from opentelemetry import trace

from headrace import attributes
from headrace.batcher.job import Job
from headrace.batcher.waiting.order import FairOrder
from headrace.metrics import catalogue
from headrace.metrics.words import Outcome

_tracer = trace.get_tracer("headrace.batcher")


class RequestQueue(FairOrder[Job]):
    """The requests of one tier that wait for a worker.

    limit     the most requests that may wait, those at the intake included; interrupted answers do not count
    ageing    seconds after which the priority of a request rises by one
    quantum   tokens that a tenant may take per turn
    """

    def __init__(self, limit: int, *, tier: str, ageing: float = 10.0, quantum: int = 512) -> None:
        super().__init__(ageing=ageing, quantum=quantum)
        self.limit = limit
        self._tier = tier
        self._depth = catalogue.QUEUE_DEPTH.of(tier=tier, stage="worker")

    def put(self, job: Job) -> None:
        """Add a new request. Admission keeps the limit."""
        self._record_entry(job)
        super().put(job)

    def put_back(self, job: Job) -> None:
        """Add an interrupted answer."""
        self._record_entry(job)
        super().put_back(job)

    def take(self, job: Job) -> None:
        """Remove *job* to submit it to a worker, and charge its cost to its tenant."""
        super().take(job)
        self._record_exit(job, "ok")

    def remove(self, job: Job, outcome: Outcome) -> bool:
        """Remove a request that ends here with *outcome*. Returns False if it does not wait here."""
        if not self.discard(job):
            return False
        self._record_exit(job, outcome)
        return True

    def _record_entry(self, job: Job) -> None:
        self._depth.add(1)
        job.queued = time.monotonic()
        if job.span.is_recording():
            job.queue_span = _tracer.start_span(
                attributes.SPAN_QUEUE, context=trace.set_span_in_context(job.span)
            )

    def _record_exit(self, job: Job, outcome: Outcome) -> None:
        self._depth.add(-1)
        wait = catalogue.QUEUE_WAIT.of(tier=self._tier, stage="worker", outcome=outcome)
        wait.record(time.monotonic() - job.queued)
        if job.queue_span.is_recording():
            job.queue_span.set_attribute(attributes.OUTCOME, outcome)
            job.queue_span.end()
