"""Speak the contract for all tiers: score, choose, forward."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from typing import Any

import grpc
from opentelemetry import metrics, trace

from headrace import attributes
from headrace.router.attempts import across_tiers
from headrace.router.complexity import Score, Scorer
from headrace.router.policy import Decision, Hints, decide
from headrace.router.tiers import Tiers
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import GenerationServiceServicer
from headrace.v1.routing_service_pb2_grpc import RoutingServiceServicer
from headrace.validation import check_request

SERVICES = (
    *generation_service_pb2.DESCRIPTOR.services_by_name.values(),
    *routing.DESCRIPTOR.services_by_name.values(),
)

_tracer = trace.get_tracer("headrace.router")
_routed = metrics.get_meter("headrace.router").create_counter(
    attributes.METRIC_ROUTED, description="requests, by the tier that they were sent to"
)

_Context = grpc.aio.ServicerContext[Any, Any]


class RouterServicer(GenerationServiceServicer, RoutingServiceServicer):
    """The mesh, as its callers see it.

    default_deadline   seconds for a request that came without a deadline
    resume_seconds     how long an answer that lost its batcher waits for another one of its tier
    """

    def __init__(
        self, tiers: Tiers, scorer: Scorer, *, default_deadline: float, resume_seconds: float = 10.0
    ) -> None:
        self._tiers = tiers
        self._scorer = scorer
        self._default_deadline = default_deadline
        self._resume_seconds = resume_seconds

    async def Generate(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Send the prompt to the tier that fits it, and stream its answer."""
        check_request(request)
        remaining = context.time_remaining()
        ends = time.monotonic() + (self._default_deadline if remaining is None else remaining)
        with _tracer.start_as_current_span(attributes.SPAN_SCORE) as span:
            score = self._scorer.score(_text(request))
            span.set_attribute(attributes.SCORE, score.value)
        forwarded = pb.GenerateRequest()
        forwarded.CopyFrom(request)
        forwarded.request_id = request.request_id or str(uuid.uuid4())
        if not forwarded.sampling.HasField("seed"):
            forwarded.sampling.seed = secrets.randbits(64)
        trace.get_current_span().set_attribute(attributes.REQUEST_ID, forwarded.request_id)
        answer = across_tiers(
            lambda failed: self._tiers[self._decide(score, request, failed).tier],
            forwarded,
            ends=ends,
            resume_seconds=self._resume_seconds,
        )
        async with aclosing(answer) as responses:
            async for response in responses:
                if response.HasField("accepted"):
                    response.accepted.score = score.value
                yield response

    async def Explain(self, request: routing.ExplainRequest, context: _Context) -> routing.ExplainResponse:
        """Say where a request would go, and why."""
        check_request(request.request)
        score = self._scorer.score(_text(request.request))
        decision = decide(score.value, _hints(request.request.routing), self._tiers.views())
        return routing.ExplainResponse(
            score=score.value,
            features=[
                routing.FeatureShare(name=feature.name, value=feature.value, log_odds=feature.log_odds)
                for feature in score.features
            ],
            bias=score.bias,
            tier=decision.tier,
            candidates=[
                routing.Candidate(
                    tier=self._tiers[candidate.tier.name].seen,
                    threshold=candidate.tier.threshold,
                    eligible=candidate.eligible,
                    reason=candidate.reason,
                )
                for candidate in decision.candidates
            ],
            why=decision.why,
        )

    async def ListTiers(
        self, request: routing.ListTiersRequest, context: _Context
    ) -> routing.ListTiersResponse:
        """All tiers, smallest first, as last seen."""
        return routing.ListTiersResponse(tiers=[tier.seen for tier in self._tiers.tiers])

    def _decide(self, score: Score, request: pb.GenerateRequest, failed: Collection[str]) -> Decision:
        decision = decide(score.value, _hints(request.routing), self._tiers.views(), exclude=failed)
        trace.get_current_span().set_attributes(
            {
                attributes.SCORE: score.value,
                attributes.TIER: decision.tier,
                attributes.ROUTE_REASON: decision.why,
            }
        )
        _routed.add(1, {attributes.TIER: decision.tier})
        return decision


def _text(request: pb.GenerateRequest) -> str:
    """What the score reads: the raw prompt, or what the user said last.

    The system prompt and earlier turns are left out: the same for many requests, they would say more
    about the application than about the question.
    """
    if request.HasField("chat"):
        said = [turn.content for turn in request.chat.messages if turn.role == "user"]
        return said[-1] if said else request.chat.messages[-1].content
    return request.prompt


def _hints(hints: pb.Routing) -> Hints:
    return Hints(
        tier=hints.tier,
        model=hints.model,
        min_tier=hints.min_tier,
        max_tier=hints.max_tier,
        quality_preference=hints.quality_preference if hints.HasField("quality_preference") else 0.5,
        allow_escalation=hints.allow_escalation if hints.HasField("allow_escalation") else True,
    )
