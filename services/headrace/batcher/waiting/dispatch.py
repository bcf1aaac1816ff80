"""Bring what waits and room at the workers together, in batches.

Who is next says `queue`, when a batch is complete `window`, which worker it goes to `placement`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from opentelemetry import metrics, trace

from headrace import attributes
from headrace.batcher.inbox import Move
from headrace.batcher.job import Job
from headrace.batcher.links import failover
from headrace.batcher.links.breaker import State
from headrace.batcher.links.link import WorkerLink
from headrace.batcher.links.pool import WorkerPool
from headrace.batcher.waiting import placement
from headrace.batcher.waiting.admission import Admission
from headrace.batcher.waiting.line import Line
from headrace.batcher.waiting.prefixes import Prefixes
from headrace.batcher.waiting.window import Window

LOOK_SECONDS = 1.0  # the longest between two looks: breakers close, deadlines pass, workers stay away

_tracer = trace.get_tracer("headrace.batcher")
_batch_size = metrics.get_meter("headrace.batcher").create_histogram(
    attributes.METRIC_BATCH_SIZE,
    description="sequences per batch",
    explicit_bucket_boundaries_advisory=attributes.BUCKETS_SIZE,
)


class Dispatcher:
    """Takes jobs out of the line and sends them to workers.

    labels   attributes of spans and metrics
    """

    def __init__(
        self,
        line: Line,
        pool: WorkerPool,
        window: Window,
        prefixes: Prefixes,
        admission: Admission,
        labels: dict[str, str],
    ) -> None:
        self._line = line
        self._pool = pool
        self._window = window
        self._prefixes = prefixes
        self._admission = admission
        self._labels = labels

    def dispatch(self, now: float) -> float:
        """Send every batch that is complete; returns seconds until the next one is."""
        if not self._line.queue:
            return LOOK_SECONDS
        candidates = self._candidates(now)
        if not candidates:
            return LOOK_SECONDS
        begun = self._line.queue.begun
        if not begun and (closes := self._closes(candidates)) > now:
            return closes - now
        batches: dict[str, list[Job]] = {}
        for job in begun:
            self._place(job, candidates, batches)
        while (head := self._line.queue.head(now)) is not None and self._place(head, candidates, batches):
            pass
        for link in self._pool:
            if link.target in batches:
                self._submit(link, batches[link.target], now)
        # Whoever got a full batch may take another at once.
        full = any(len(batch) >= self._window.size for batch in batches.values())
        return 0.0 if self._line.queue and full else LOOK_SECONDS

    def _place(
        self, job: Job, candidates: dict[str, placement.Candidate], batches: dict[str, list[Job]]
    ) -> bool:
        """Take a job from the queue into the batch of the worker that suits it; false if none does now."""
        probation = failover.on_probation(job)
        suited = {
            link.target
            for link in self._suited(job)
            if link.target in candidates and (not probation or link.lived_after(job.history.lost_at))
        }
        chosen = placement.choose(
            (
                replace(one, held=self._prefixes.held(job.blocks, one.name))
                for one in candidates.values()
                if one.name in suited
            ),
            job.tokens,
            avoid=failover.avoided(job),
            probation=probation,
        )
        if chosen is None:
            return False
        self._line.queue.take(job)
        batch = batches.setdefault(chosen.name, [])
        batch.append(job)
        job.uncached = max(job.tokens - chosen.held, 1)
        if chosen.shares:
            self._prefixes.expect(job.blocks, chosen.name)
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

    def _suited(self, job: Job) -> list[WorkerLink]:
        """The workers that can give the answer to its end, as it was begun, and have not failed it just now.

        Such a worker is waited for while it has no room, but not while it is rested; what no working one
        is, is not asked for.
        """
        now, length = time.monotonic(), len(job.prompt_ids) + job.sampling.max_tokens
        kind, failed_by = job.history.kind, failover.failed_by(job)
        rules: tuple[Callable[[WorkerLink], bool], ...] = (
            lambda link: link.context_length >= length,
            lambda link: not job.answered or link.kind == kind,
            lambda link: link.target != failed_by,
        )
        suited = list(self._pool)
        for suits in rules:
            fewer = [link for link in suited if suits(link)]
            if any(link.ready and link.breaker.state(now) is State.CLOSED for link in fewer):
                suited = fewer
        return suited

    def _candidates(self, now: float) -> dict[str, placement.Candidate]:
        return {
            link.target: placement.Candidate(
                name=link.target,
                room=room,
                sequences=link.outstanding,
                backlog=link.backlog,
                budget=self._window.budget(link.load.prefill_tokens_per_second),
                rate=link.load.prefill_tokens_per_second,
                others=link.others_backlog,
                probation=any(failover.on_probation(job) for job in link.flights.jobs()),
                shares=link.shared_block_tokens > 0,
            )
            for link in self._pool
            if (room := link.room(now)) > 0
        }

    def _closes(self, candidates: dict[str, placement.Candidate]) -> float:
        waiting = list(self._line.queue)
        steps = [link.load.step_time.ToNanoseconds() / 1e9 for link in self._pool.ready()]
        now = time.monotonic()
        return self._window.closes(
            len(waiting),
            sum(job.uncached for job in waiting),
            sum(candidate.room for candidate in candidates.values()),
            oldest=min(job.arrived for job in waiting),
            linger=self._window.linger_for(
                arrivals=self._admission.arrivals.per_second(now), step_seconds=min(steps, default=0.0)
            ),
            hungry=any(candidate.backlog == 0 for candidate in candidates.values()),
        )

    def _submit(self, link: WorkerLink, batch: list[Job], now: float) -> None:
        span = self._batch_span(link, batch)
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
            self._line.left(job, "submitted")
        self._admission.drained.add(now, len(batch))
        _batch_size.record(len(batch), self._labels)
        span.set_attribute(attributes.BATCH_ID, link.submit(batch, span, now))
        span.end()

    def _batch_span(self, link: WorkerLink, batch: list[Job]) -> trace.Span:
        """A span for the batch, if any of its members is sampled: else it would be alone in its trace."""
        members = [job.span.get_span_context() for job in batch]
        if not any(member.trace_flags.sampled for member in members):
            return trace.INVALID_SPAN
        return _tracer.start_span(
            attributes.SPAN_BATCH,
            context=trace.set_span_in_context(trace.INVALID_SPAN),  # a root: it has many parents
            links=[trace.Link(member) for member in members],
            attributes={
                attributes.BATCH_SIZE: len(batch),
                attributes.BATCH_TOKENS: sum(job.tokens for job in batch),
                attributes.WORKER: link.worker_id,
                **self._labels,
            },
        )
