"""Send waiting jobs to workers with free slots, in batches.

`queue` decides which job is next, `window` when a batch is complete, and `placement` which worker receives
it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from opentelemetry import trace

from headrace import attributes, errors
from headrace.batcher.inbox import WorkerChange
from headrace.batcher.job import Job
from headrace.batcher.links import failover
from headrace.batcher.links.link import WorkerLink
from headrace.batcher.links.pool import WorkerPool
from headrace.batcher.token_details import needed_features
from headrace.batcher.waiting.admission import Admission
from headrace.batcher.waiting.placement import WorkerCandidate, choose
from headrace.batcher.waiting.prefixes import PrefixIndex
from headrace.batcher.waiting.queue import RequestQueue
from headrace.batcher.waiting.window import Window
from headrace.metrics import catalogue
from headrace.runtime.breaker import BreakerState

# The longest time between two dispatches: breakers close, deadlines pass, and workers may stay away.
MAX_IDLE_SECONDS = 1.0

_tracer = trace.get_tracer("headrace.batcher")


class Dispatcher:
    """Takes jobs out of the queue and submits them to workers.

    tier     its name, for spans and metrics
    """

    def __init__(
        self,
        queue: RequestQueue,
        pool: WorkerPool,
        window: Window,
        prefixes: PrefixIndex,
        admission: Admission,
        tier: str,
    ) -> None:
        self._queue = queue
        self._pool = pool
        self._window = window
        self._prefixes = prefixes
        self._admission = admission
        self._tier = tier
        self._size = catalogue.BATCH_SIZE.of(tier=tier)
        self._fill = catalogue.BATCH_FILL.of(tier=tier)
        self._stalls = catalogue.CREDIT_STALLS.of(tier=tier, credit="worker")
        self._stalled = False  # requests wait because no worker has a free slot

    def dispatch(self, now: float) -> float:
        """Submit every batch that is complete. Returns the seconds until the next one is."""
        candidates = self._candidates(now) if self._queue else {}
        stalled = bool(self._queue) and not candidates
        if stalled and not self._stalled:
            self._stalls.add()
        self._stalled = stalled
        if not candidates:
            return MAX_IDLE_SECONDS
        interrupted = self._queue.interrupted
        if not interrupted and (closes := self._closes_at(candidates)) > now:
            return closes - now
        batches: dict[str, list[Job]] = {}
        for job in interrupted:
            self._place(job, candidates, batches)
        while (head := self._queue.head(now)) is not None and self._place(head, candidates, batches):
            pass
        for link in self._pool:
            if link.target in batches:
                self._submit(link, batches[link.target], now)
        # A worker that received a full batch may accept another one now.
        full = any(len(batch) >= self._window.size for batch in batches.values())
        return 0.0 if self._queue and full else MAX_IDLE_SECONDS

    def _place(self, job: Job, candidates: dict[str, WorkerCandidate], batches: dict[str, list[Job]]) -> bool:
        """Move a job from the queue to the batch of the best worker. Returns False if the job has to wait.

        A job that no ready worker can serve any more fails.
        """
        needed = needed_features(job.sampling, "sampling" if job.form.grammar else "")
        if needed and not any(link.ready and link.has(needed) for link in self._pool):
            self._queue.remove(job, "failed")
            job.fail(_no_worker_has(needed, job))
            return True
        probation = failover.on_probation(job)
        suitable = []
        for link in self._suitable(job):
            candidate = candidates.get(link.target)
            if (
                candidate is None
                or not link.has(needed)
                or (probation and not link.responded_after(job.history.lost_at))
            ):
                continue
            candidate.cached = self._prefixes.cached_tokens(job.usable_blocks, link.target)
            if probation:
                candidate.probation |= any(map(failover.on_probation, link.in_flight.jobs()))
            suitable.append(candidate)
        chosen = choose(suitable, job.prefill_tokens, avoid=failover.avoided(job), probation=probation)
        if chosen is None:
            return False
        self._queue.take(job)
        batch = batches.setdefault(chosen.name, [])
        batch.append(job)
        job.uncached = max(job.prefill_tokens - chosen.cached, 1)
        if chosen.shares_prefixes:
            self._prefixes.expect(job.blocks, chosen.name)
        chosen.free_slots -= 1
        chosen.sequences += 1
        chosen.backlog += job.uncached
        chosen.probation |= probation
        if not chosen.free_slots or len(batch) >= self._window.size:
            del candidates[chosen.name]
        return True

    def _suitable(self, job: Job) -> list[WorkerLink]:
        """Return the workers that can complete the answer, with equal weights, and have not just failed it.

        The job waits for such a worker while it has no free slot, but not while its breaker is open. A rule
        that no working worker satisfies does not apply.
        """
        suitable = list(self._pool)
        if len(suitable) == 1:  # no rule applies
            return suitable
        now, length = time.monotonic(), len(job.prompt_ids) + job.sampling.max_tokens
        kind, failed_by = job.history.kind, failover.failed_by(job)
        rules: tuple[Callable[[WorkerLink], bool], ...] = (
            lambda link: link.context_length >= length,
            lambda link: not job.answer_length or link.kind == kind,
            lambda link: link.target != failed_by,
        )
        for satisfies in rules:
            fewer = [link for link in suitable if satisfies(link)]
            if any(link.ready and link.breaker.state(now) is BreakerState.CLOSED for link in fewer):
                suitable = fewer
        return suitable

    def _candidates(self, now: float) -> dict[str, WorkerCandidate]:
        return {
            link.target: WorkerCandidate(
                name=link.target,
                free_slots=free_slots,
                sequences=link.outstanding,
                backlog=link.backlog,
                budget=self._window.budget(link.load.prefill_tokens_per_second, link.step_tokens),
                prefill_rate=link.load.prefill_tokens_per_second,
                others_backlog=link.others_backlog,
                shares_prefixes=link.shared_block_tokens > 0,
            )
            for link in self._pool
            if (free_slots := link.free_slots(now)) > 0
        }

    def _closes_at(self, candidates: dict[str, WorkerCandidate]) -> float:
        """Return when the next batch is complete, time.monotonic(); 0 means now."""
        queue, window = self._queue, self._window
        idle, free_slots = False, 0
        for candidate in candidates.values():
            idle = idle or candidate.backlog == 0
            free_slots += candidate.free_slots
        if window.is_complete(len(queue), queue.uncached, free_slots, idle=idle):
            return 0.0
        linger = window.linger_for(
            arrivals=self._admission.arrivals.per_second(time.monotonic()),
            step_seconds=self._pool.step_seconds(),
        )
        return min(job.arrived for job in queue) + linger  # of fewer jobs than make a batch

    def _submit(self, link: WorkerLink, batch: list[Job], now: float) -> None:
        span = self._batch_span(link, batch)
        for job in batch:
            history = job.history
            if job.started and job.wants_route_changes:
                job.inbox.put_event(WorkerChange(history.worker, link.worker_id, history.reason, job.attempt))
            job.submitted = now if job.submitted is None else job.submitted
            history.worker, history.address, history.kind = link.worker_id, link.target, link.kind
            history.incarnation = link.incarnation
            history.length_at_start = job.answer_length
            history.replayed += job.answer_length
        self._admission.drained.add(now, len(batch))
        self._size.record(len(batch))
        self._fill.record(len(batch) / self._window.size)
        batch_id = link.submit(batch, span, now)
        if span.is_recording():
            for job in batch:
                job.span.add_link(span.get_span_context())
            span.set_attribute(attributes.BATCH_ID, batch_id)
            span.end()

    def _batch_span(self, link: WorkerLink, batch: list[Job]) -> trace.Span:
        """Start a span for the batch if any member is recorded; otherwise it would be alone in a trace."""
        if not any(job.span.is_recording() for job in batch):
            return trace.INVALID_SPAN
        return _tracer.start_span(
            attributes.SPAN_BATCH,
            context=trace.set_span_in_context(trace.INVALID_SPAN),  # a root span: it has many parents
            links=[trace.Link(job.span.get_span_context()) for job in batch],
            attributes={
                attributes.BATCH_SIZE: len(batch),
                attributes.BATCH_TOKENS: sum(job.prefill_tokens for job in batch),
                attributes.WORKER: link.worker_id,
                attributes.TIER: self._tier,
            },
        )


def _no_worker_has(features: Collection[str], job: Job) -> errors.HeadraceError:
    """Return the error of a request whose workers were replaced by some without these features."""
    error = errors.WorkerLost if job.started else errors.NoWorkers
    return error(f"no ready worker supports {' and '.join(sorted(features))} any more", retry_after=1.0)
