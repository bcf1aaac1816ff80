"""Speak the contract for all tiers: protobuf to decisions, answers back to protobuf."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from opentelemetry import metrics, trace

from headrace import attributes, errors
from headrace.router.attempts import across_tiers, on_tier
from headrace.router.bills import Bill
from headrace.router.cascade import Draft, Judge, Sampler, cascade, sample_request
from headrace.router.chooser import Asked, Chooser
from headrace.router.complexity import Score, Scorer
from headrace.router.feedback import Answered, Feedback
from headrace.router.policy import Decision, Hints
from headrace.router.tiers import Tier, Tiers
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
_meter = metrics.get_meter("headrace.router")
_routed = _meter.create_counter(
    attributes.METRIC_ROUTED, description="requests, by the tier that they were sent to"
)
_drafts = _meter.create_counter(
    attributes.METRIC_DRAFTS, description="drafts that were judged, by tier and outcome"
)
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
        remaining = context.time_remaining()
        ends = time.monotonic() + (self._default_deadline if remaining is None else remaining)
        forwarded = pb.GenerateRequest()
        forwarded.CopyFrom(request)
        forwarded.request_id = request.request_id or str(uuid.uuid4())
        if not forwarded.sampling.HasField("seed"):
            forwarded.sampling.seed = secrets.randbits(64)
        trace.get_current_span().set_attribute(attributes.REQUEST_ID, forwarded.request_id)
        journey = _Journey(
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
                asked=journey.bill.asked,
            )

        def sample(tier: str) -> AsyncGenerator[pb.GenerateResponse, None]:
            return on_tier(
                self._tiers[tier],
                sample_request(forwarded, self._chooser.rules.tokens),
                ends=ends,
                resume_seconds=0.0,
                asked=journey.bill.asked,
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
                    yield response
        finally:
            self._settle(journey, forwarded.request_id)

    async def Explain(self, request: routing.ExplainRequest, context: _Context) -> routing.ExplainResponse:
        """Say where a request would go, and why."""
        check_request(request.request)
        score = self._score(request.request)
        asked = _asked(request.request, score)
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
            tiers=[self._tier(tier.name) for tier in self._tiers.tiers], bill=_bill(self._bill)
        )

    async def Feedback(self, request: routing.FeedbackRequest, context: _Context) -> routing.FeedbackResponse:
        """Book how good an answer was."""
        outcome = request.WhichOneof("outcome")
        if outcome is None:
            raise errors.InvalidRequest("the feedback has no outcome: set ok or quality", field="outcome")
        quality = float(request.ok) if outcome == "ok" else request.quality
        if not 0 <= quality <= 1:
            raise errors.InvalidRequest(f"quality is {quality:g}, must be 0 to 1", field="quality")
        names = [tier.name for tier in self._tiers.tiers]
        if request.tier and request.tier not in names:
            raise errors.UnknownTier(
                f"tier is {request.tier!r}; the tiers are {', '.join(names)}", field="tier"
            )
        tier = request.tier or self._feedback.recall(request.request_id).tier
        kept = await self._feedback.keep(request.request_id, tier, quality)
        _feedback.add(
            1, {attributes.TIER: tier, attributes.OUTCOME: "good" if quality >= 0.5 else "not_good"}
        )
        return routing.FeedbackResponse(kept=kept, tier=tier)

    def _score(self, request: pb.GenerateRequest) -> Score:
        with _tracer.start_as_current_span(attributes.SPAN_SCORE) as span:
            score = self._scorer.score(_text(request))
            span.set_attribute(attributes.SCORE, score.value)
        return score

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

    def _settle(self, journey: _Journey, request_id: str) -> None:
        """Book the request, however it ended."""
        bill = journey.bill
        journey.close()
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
        if journey.accepted is not None:
            self._feedback.remember(request_id, Answered(journey.tier, journey.asked.score, journey.text))


class _Journey:
    """One request on its way: where it was sent, what is judged, what it used.

    tier      where it is now
    accepted  the event that the caller got, if it did
    """

    def __init__(
        self,
        chooser: Chooser,
        tiers: Tiers,
        bill: Bill,
        request: pb.GenerateRequest,
        score: Score,
        *,
        ends: float,
    ) -> None:
        self.text = _text(request)
        self.asked = _asked(request, score)
        self.bill = bill
        self.tier = ""
        self.accepted: pb.Accepted | None = None
        self._chooser = chooser
        self._tiers = tiers
        self._ends = ends
        self._shows_logprobs = request.sampling.logprobs
        self._decision: Decision | None = None
        self._delivered = 0
        self._finished = False

    @property
    def may_draft(self) -> bool:
        """Whether any answer of it may be judged."""
        return self._chooser.may_draft(self.asked)

    def choose(self, rejected: Sequence[str], failed: Collection[str]) -> Tier:
        """The tier to try next. Raises what `policy.decide` raises."""
        now = time.monotonic()
        decision = self._chooser.choose(
            self.asked, now, slack=self._ends - now, failed=list(failed), rejected=rejected
        )
        if self._decision is None:
            self._chooser.note(self.asked, decision)
        self._decision = decision
        self.tier = decision.tier
        trace.get_current_span().set_attributes(
            {
                attributes.SCORE: self.asked.score,
                attributes.TIER: decision.tier,
                attributes.ROUTE_REASON: decision.why,
            }
        )
        _routed.add(1, {attributes.TIER: decision.tier})
        return self._tiers[decision.tier]

    def judge(self, sample: Callable[[str], AsyncGenerator[pb.GenerateResponse, None]]) -> Judge | None:
        """How the answer that has begun is judged; None if it is not.

        sample   streams a second answer of a tier
        """
        assert self._decision is not None, "an answer begins with a decision"
        now = time.monotonic()
        slack, rules, tier = self._ends - now, self._chooser.rules, self.tier
        if not self._chooser.judges(self.asked, self._decision, now, slack):
            return None
        sampler = None
        if self._chooser.samples(self.asked, self._decision, now, slack):
            sampler = Sampler(lambda: sample(tier), rules.sample_seconds, self._sampled)
        return Judge(self._good, rules.tokens, sampler)

    def _good(self, draft: Draft) -> bool:
        with _tracer.start_as_current_span(attributes.SPAN_CHECK) as span:
            text, finished = draft.to_judge()
            released, check = self._chooser.check(
                self.text,
                text,
                finished=finished,
                logprobs=draft.logprobs,
                preference=self.asked.hints.quality_preference,
                samples=draft.samples,
            )
            outcome = "released" if released else "escalated"
            span.set_attributes(
                {
                    attributes.TIER: draft.tier,
                    attributes.CHECK_GOOD: check.good,
                    attributes.CHECK_REASONS: list(check.reasons),
                    attributes.OUTCOME: outcome,
                }
            )
        _drafts.add(1, {attributes.TIER: draft.tier, attributes.OUTCOME: outcome})
        return released

    def _sampled(self, sample: Draft) -> None:
        self.bill.sampled(
            sample.tier,
            prompt_tokens=sample.prompt_tokens,
            tokens=sample.tokens,
            cached_tokens=sample.cached_tokens,
        )

    def gave_up(self, draft: Draft) -> None:
        """Book a draft that is thrown away; the answer is now where the last decision sent it."""
        self.bill.wasted(
            draft.tier,
            prompt_tokens=draft.prompt_tokens,
            tokens=draft.tokens,
            cached_tokens=draft.cached_tokens,
        )
        self._chooser.note_escalation(self.asked, draft.tier, self.tier)

    def pass_on(self, response: pb.GenerateResponse) -> None:
        """Make an event the caller's."""
        event = response.WhichOneof("event")
        if event == "accepted":
            response.accepted.score = self.asked.score
            self.accepted = response.accepted
            # A draft that was released although it was no good is still where it was made.
            self.tier = response.accepted.tier or self.tier
            self._chooser.answered(self.asked, self.tier, time.monotonic())
        elif event == "delta":
            self._delivered += response.delta.token_count
            if not self._shows_logprobs:
                del response.delta.logprobs[:]
        elif event == "finish":
            usage = response.finish.usage
            # Waste of drafts that were given up is booked with their own tiers.
            given_up = sum(charge.wasted_tokens for _, charge in self.bill.charges)
            self._answered(
                usage.prompt_tokens,
                self._delivered,
                max(usage.wasted_tokens - given_up, 0),
                min(usage.cached_tokens, usage.prompt_tokens),
            )
            self._chooser.finished(self.tier, response.finish, time.monotonic())
            response.finish.bill.CopyFrom(_bill(self.bill))

    def close(self) -> None:
        """Book what was delivered of an answer that broke off."""
        if self.accepted is not None and not self._finished:
            self._answered(self.accepted.prompt_tokens, self._delivered, 0, 0)

    def _answered(self, prompt_tokens: int, tokens: int, wasted_tokens: int, cached_tokens: int) -> None:
        self._finished = True
        self.bill.answered(
            self.tier,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            wasted_tokens=wasted_tokens,
            cached_tokens=cached_tokens,
        )


def _text(request: pb.GenerateRequest) -> str:
    """What the score reads: the raw prompt, or what the user said last.

    The system prompt and earlier turns are left out: the same for many requests, they would say more
    about the application than about the question.
    """
    if request.HasField("chat"):
        said = [turn.content for turn in request.chat.messages if turn.role == "user"]
        return said[-1] if said else request.chat.messages[-1].content
    return request.prompt


def _asked(request: pb.GenerateRequest, score: Score) -> Asked:
    hints = request.routing
    return Asked(
        score=score.value,
        hints=Hints(
            tier=hints.tier,
            model=hints.model,
            min_tier=hints.min_tier,
            max_tier=hints.max_tier,
            quality_preference=hints.quality_preference if hints.HasField("quality_preference") else 0.5,
            allow_escalation=hints.allow_escalation if hints.HasField("allow_escalation") else True,
        ),
        tenant=hints.tenant,
        session=hints.session_id,
        max_tokens=request.sampling.max_tokens if request.sampling.HasField("max_tokens") else None,
        cascade=hints.cascade if hints.HasField("cascade") else None,
        resumes=bool(request.resume.token_ids),
    )


def _bill(bill: Bill) -> pb.Bill:
    message = pb.Bill(cost=bill.cost, largest_tier_cost=bill.largest_tier_cost)
    for tier, charge in bill.charges:
        message.charges.add(
            tier=tier,
            answers=charge.answers,
            attempts=charge.attempts,
            prompt_tokens=charge.prompt_tokens,
            cached_tokens=charge.cached_tokens,
            completion_tokens=charge.completion_tokens,
            wasted_tokens=charge.wasted_tokens,
            cost=bill.cost_of(tier),
        )
    return message
