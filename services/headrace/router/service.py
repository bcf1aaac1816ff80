"""Speak the contract for all tiers: protobuf to decisions, answers back to protobuf."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from opentelemetry import metrics, trace

from headrace import attributes, errors
from headrace.router.answering.attempts import across_tiers, on_tier
from headrace.router.answering.cascade import cascade, sample_request
from headrace.router.answering.journey import Journey, asked_of, bill_message, text_of
from headrace.router.chooser import Chooser
from headrace.router.optional import optional
from headrace.router.state.bills import Bill
from headrace.router.state.feedback import Answered, Feedback
from headrace.router.state.tiers import HOPS, MAX_HOPS, Tiers
from headrace.routing.score import UNSCORED, Score, Scorer
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import GenerationServiceServicer
from headrace.v1.routing_service_pb2_grpc import RoutingServiceServicer
from headrace.validation import check_feedback, check_request

SERVICES = (
    *generation_service_pb2.DESCRIPTOR.services_by_name.values(),
    *routing.DESCRIPTOR.services_by_name.values(),
)

_tracer = trace.get_tracer("headrace.router")
_meter = metrics.get_meter("headrace.router")
_billed = _meter.create_counter(
    attributes.METRIC_BILLED_TOKENS, unit="{token}", description="tokens of the bill, by tier and kind"
)
_cost = _meter.create_counter(attributes.METRIC_COST, description="cost by the configured prices, by tier")
_largest_cost = _meter.create_counter(
    attributes.METRIC_LARGEST_COST, description="what the largest tier would have cost for the same tokens"
)
_feedback = _meter.create_counter(
    attributes.METRIC_FEEDBACK, description="outcomes that callers told, by tier and outcome"
)

_Context = grpc.aio.ServicerContext[Any, Any]


class RouterServicer(GenerationServiceServicer, RoutingServiceServicer):
    """The mesh, as its callers see it.

    default_deadline   seconds for a request that came without a deadline
    resume_seconds     how long an answer that lost its batcher waits for another one of its tier
    """

    def __init__(
        self,
        tiers: Tiers,
        scorer: Scorer,
        chooser: Chooser,
        feedback: Feedback,
        *,
        default_deadline: float,
        resume_seconds: float = 10.0,
    ) -> None:
        self._tiers = tiers
        self._scorer = scorer
        self._chooser = chooser
        self._feedback = feedback
        self._default_deadline = default_deadline
        self._resume_seconds = resume_seconds
        self._bill = self._new_bill()

    async def Generate(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Send the prompt to the tier that fits it, and stream its answer."""
        check_request(request)
        hops = _hops(context)
        remaining = context.time_remaining()
        ends = time.monotonic() + (self._default_deadline if remaining is None else remaining)
        forwarded = pb.GenerateRequest()
        forwarded.CopyFrom(request)
        forwarded.request_id = request.request_id or str(uuid.uuid4())
        if not forwarded.sampling.HasField("seed"):
            forwarded.sampling.seed = secrets.randbits(64)
        trace.get_current_span().set_attribute(attributes.REQUEST_ID, forwarded.request_id)
        journey = Journey(
            self._chooser, self._tiers, self._new_bill(), request, self._score(request), ends=ends
        )
        # The judge reads them, and nobody else who has not asked.
        forwarded.sampling.logprobs = request.sampling.logprobs or journey.may_draft
        if not forwarded.sampling.logprobs:
            forwarded.sampling.ClearField("logprobs")

        def begin(rejected: Sequence[str]) -> AsyncGenerator[pb.GenerateResponse, None]:
            return across_tiers(
                lambda failed: journey.choose(rejected, failed),
                forwarded,
                ends=ends,
                resume_seconds=self._resume_seconds,
                returning=self._tiers.returning,
                asked=journey.took,
                hops=hops,
            )

        def sample(tier: str) -> AsyncGenerator[pb.GenerateResponse, None]:
            return on_tier(
                self._tiers[tier],
                sample_request(forwarded, self._chooser.rules.tokens),
                ends=ends,
                resume_seconds=0.0,
                asked=journey.took,
                hops=hops,
            )

        answer = cascade(
            begin,
            lambda: journey.judge(sample),
            journey.gave_up,
            tier_of=lambda: journey.tier,
            tells_moves=request.stream.include_route_changes,
        )
        try:
            async with aclosing(answer) as responses:
                async for response in responses:
                    journey.pass_on(response)
                    if response.HasField("accepted"):
                        self._remember(journey, forwarded)
                    yield response
        finally:
            self._settle(journey)

    async def Explain(self, request: routing.ExplainRequest, context: _Context) -> routing.ExplainResponse:
        """Say where a request would go, and why."""
        check_request(request.request)
        score = self._score(request.request)
        asked = asked_of(request.request, score)
        now = time.monotonic()
        decision = self._chooser.choose(asked, now)
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
                    tier=self._tier(candidate.tier.name),
                    threshold=candidate.tier.threshold,
                    eligible=candidate.eligible,
                    reason=candidate.reason,
                )
                for candidate in decision.candidates
            ],
            why=decision.why,
            cascade=self._chooser.judges(asked, decision, now, None),
        )

    async def ListTiers(
        self, request: routing.ListTiersRequest, context: _Context
    ) -> routing.ListTiersResponse:
        """All tiers, smallest first, as last seen, and the bill of all that was answered."""
        return routing.ListTiersResponse(
            tiers=[self._tier(tier.name) for tier in self._tiers.tiers], bill=bill_message(self._bill)
        )

    async def Feedback(self, request: routing.FeedbackRequest, context: _Context) -> routing.FeedbackResponse:
        """Book how good an answer was."""
        check_feedback(request)
        quality = float(request.ok) if request.HasField("ok") else request.quality
        names = [tier.name for tier in self._tiers.tiers]
        if request.tier and request.tier not in names:
            raise errors.UnknownTier(
                f"tier is {errors.quoted(request.tier)}; the tiers are {', '.join(names)}", field="tier"
            )
        answered = self._feedback.recall(request.request_id, tenant=request.tenant)
        again = answered.quality is not None
        kept = await self._feedback.keep(
            request.request_id, request.tier or answered.tier, quality, tenant=request.tenant
        )
        if not again:
            _feedback.add(
                1,
                {
                    attributes.TIER: answered.tier,
                    attributes.OUTCOME: "good" if quality >= 0.5 else "not_good",
                },
            )
        return routing.FeedbackResponse(kept=kept, tier=answered.tier)

    def _score(self, request: pb.GenerateRequest) -> Score:
        """How hard the prompt looks; `UNSCORED` where the scorer fails on it."""
        with _tracer.start_as_current_span(attributes.SPAN_SCORE) as span, optional("scorer"):
            score = self._scorer.score(text_of(request))
            if not 0 <= score.value <= 1:  # nor is NaN a score
                raise ValueError("the score is not between 0 and 1")
            span.set_attribute(attributes.SCORE, score.value)
            return score
        return UNSCORED

    def _tier(self, name: str) -> routing.Tier:
        seen = routing.Tier()
        seen.CopyFrom(self._tiers[name].seen)
        if (price := self._chooser.prices.get(name)) is not None:
            seen.price.prompt, seen.price.completion = price.prompt, price.completion
            if price.cached_prompt is not None:
                seen.price.cached_prompt = price.cached_prompt
        return seen

    def _new_bill(self) -> Bill:
        return Bill([tier.name for tier in self._tiers.tiers], self._chooser.prices)

    def _remember(self, journey: Journey, request: pb.GenerateRequest) -> None:
        """Let the caller rate the answer, as soon as the answer has its tier."""
        asked = journey.asked
        with optional("feedback"):
            self._feedback.remember(
                request.request_id,
                Answered(journey.tier, asked.score if asked.scored else None, journey.text),
                tenant=asked.tenant,
            )

    def _settle(self, journey: Journey) -> None:
        """Book the request, however it ended."""
        journey.close()
        with optional("bill"):
            self._book(journey.bill)

    def _book(self, bill: Bill) -> None:
        self._bill.add(bill)
        for tier, charge in bill.charges:
            for kind, tokens in (
                ("prompt", charge.prompt_tokens),
                ("completion", charge.completion_tokens),
                ("wasted", charge.wasted_tokens),
            ):
                _billed.add(tokens, {attributes.TIER: tier, attributes.TOKEN_KIND: kind})
            if (cost := bill.cost_of(tier)) is not None:
                _cost.add(cost, {attributes.TIER: tier})
        if bill.largest_tier_cost is not None:
            _largest_cost.add(bill.largest_tier_cost)


def _hops(context: _Context) -> int:
    """How many routers the request has passed. Raises NoWorkers where they must be going in circles."""
    said = next((value for key, value in context.invocation_metadata() or () if key == HOPS), "")
    hops = int(said) if isinstance(said, str) and said.isascii() and said.isdigit() and len(said) < 9 else 0
    if hops > MAX_HOPS:
        raise errors.NoWorkers(
            f"the request has passed {hops} routers, which name each other as tiers: mend their --tiers"
        )
    return hops
