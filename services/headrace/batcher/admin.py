"""Serve the debug endpoint: the batcher's queue, workers and requests in flight."""

from __future__ import annotations

import time
from itertools import islice

import grpc

from headrace.batcher.coalescer import Coalescer
from headrace.batcher.intake.intake import Intake
from headrace.batcher.job import Job
from headrace.batcher.links.link import WorkerLink
from headrace.runtime.process_info import process_state
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1.admin_service_pb2_grpc import AdminServiceServicer

DEFAULT_MAX_SEQUENCES = 100


class AdminServicer(AdminServiceServicer):
    """Reports the internal state of the batcher."""

    def __init__(self, coalescer: Coalescer, intake: Intake, requests: ActiveRequests, *, tier: str) -> None:
        self._coalescer = coalescer
        self._intake = intake
        self._requests = requests
        self._tier = tier

    async def Inspect(
        self, request: admin.InspectRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin.InspectResponse:
        """Return the current state."""
        now, coalescer = time.monotonic(), self._coalescer
        queue, pool = coalescer.queue, coalescer.pool
        state = admin.BatcherState(
            tier=self._tier,
            queue=[
                admin.QueueState(priority=priority, tenant=tenant, waiting=count)
                for (priority, tenant), count in sorted(queue.counts().items(), reverse=True)
            ],
            interrupted=len(queue.interrupted),
            workers=[_link(link, now) for link in pool],
            in_flight=len(coalescer.live),
            prefill_tokens_per_second=coalescer.admission.estimates(now).prefill_rate,
            prefix_blocks=len(coalescer.prefixes),
            paused=len(coalescer.paused),
            tokenizing=self._intake.waiting,
            tokenizing_bytes=self._intake.bytes,
        )
        oldest_wait = max(queue.oldest_wait(now), self._intake.oldest_wait(now))
        state.oldest_wait.FromNanoseconds(int(oldest_wait * 1e9))
        places = {job: link.target for link in pool for job in link.in_flight.jobs()}
        oldest = sorted(coalescer.live, key=lambda job: job.arrived)
        for job in islice(oldest, request.max_sequences or DEFAULT_MAX_SEQUENCES):
            state.sequences.append(_sequence(job, places.get(job, ""), now, paused=job in coalescer.paused))
        return admin.InspectResponse(batcher=state, process_state=process_state(self._requests))


def _link(link: WorkerLink, now: float) -> admin.WorkerLinkState:
    state = admin.WorkerLinkState(
        target=link.target,
        worker_id=link.worker_id,
        incarnation=link.incarnation,
        state="not connected"
        if not link.connected
        else "leaving"
        if link.retiring
        else "draining"
        if link.draining
        else "suspect"
        if link.suspect
        else "ready",
        problem=link.problem,
        breaker=link.breaker.state(now).value,
        epoch=link.epoch,
        credit=link.credit,
        outstanding=link.outstanding,
        backlog_tokens=link.backlog,
    )
    state.step_p99.FromNanoseconds(int(link.liveness.step_p99 * 1e9))
    state.since_last_message.FromNanoseconds(max(int((now - link.liveness.received_at) * 1e9), 0))
    return state


def _sequence(job: Job, place: str, now: float, *, paused: bool) -> admin.SequenceState:
    state = admin.SequenceState(
        request_id=job.request_id,
        attempt=job.attempt,
        offset=job.answer_length,
        tenant=job.tenant,
        priority=job.priority,
        peer=place,
        unread=job.inbox.unread,
        losses=job.history.losses,
        paused=paused,
    )
    state.age.FromNanoseconds(int((now - job.arrived) * 1e9))
    return state
