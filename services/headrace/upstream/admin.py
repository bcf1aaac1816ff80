"""Serve the debug endpoint: the URLs of the upstream, the queue, and requests in flight."""

from __future__ import annotations

import time
from itertools import islice

import grpc

from headrace.runtime.process_info import process_state
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.upstream.answering import Answering, LiveAnswer
from headrace.upstream.limits.slots import Slots
from headrace.upstream.settings import Settings
from headrace.upstream.urls import UpstreamUrl, Urls
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1.admin_service_pb2_grpc import AdminServiceServicer

DEFAULT_MAX_SEQUENCES = 100


class AdminServicer(AdminServiceServicer):
    """Reports the internal state of the process. It contains no key."""

    def __init__(
        self,
        answering: Answering,
        slots: Slots,
        urls: Urls,
        requests: ActiveRequests,
        settings: Settings,
    ) -> None:
        self._answering = answering
        self._slots = slots
        self._urls = urls
        self._requests = requests
        self._settings = settings

    async def Inspect(
        self, request: admin.InspectRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin.InspectResponse:
        """Return the current state."""
        now, slots, live = time.monotonic(), self._slots, self._answering.live
        state = admin.UpstreamState(
            tier=self._settings.tier,
            model=self._settings.model,
            urls=[_url(url, now) for url in self._urls],
            queued=slots.queued,
            running=slots.taken,
            in_flight=len(live),
        )
        state.oldest_wait.FromNanoseconds(int(slots.oldest_wait(now) * 1e9))
        for answer in islice(live, request.max_sequences or DEFAULT_MAX_SEQUENCES):
            state.sequences.append(_sequence(answer, now))
        return admin.InspectResponse(upstream=state, process_state=process_state(self._requests))


def _url(url: UpstreamUrl, now: float) -> admin.UpstreamUrlState:
    state = admin.UpstreamUrlState(
        url=url.url,
        ready=url.usable(now),
        problem=url.why_not(now),
        breaker=url.breaker.state(now).value,
        in_flight=url.in_flight,
        context_length=url.context_length,
    )
    if (seconds := url.blocked_until - now) > 0:
        state.blocked.FromNanoseconds(int(seconds * 1e9))
    return state


def _sequence(answer: LiveAnswer, now: float) -> admin.SequenceState:
    routing = answer.request.routing
    state = admin.SequenceState(
        request_id=answer.request.request_id,
        attempt=answer.request.resume.attempt,
        offset=answer.tokens,
        tenant=routing.tenant,
        priority=routing.priority if routing.HasField("priority") else 5,
        peer=answer.url,
    )
    state.age.FromNanoseconds(int((now - answer.timing.arrived) * 1e9))
    return state
