"""Implement the gRPC services of the router: protobuf to decisions, answers back to protobuf."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, cast

import grpc
from opentelemetry import trace

from headrace import attributes, errors
from headrace.deadline import Deadline
from headrace.flushing import chooses_flushing
from headrace.metrics import catalogue
from headrace.multiplex.outbox import EventWriter
from headrace.multiplex.serving import Incoming, Multiplexer, Write
from headrace.quoting import quoted
from headrace.router.answering.facts import routing_request
from headrace.router.answering.journey import Journey
from headrace.router.answering.pins import pin_token_ids
from headrace.router.answering.prompts import turns_of
from headrace.router.billing import bill_message
from headrace.router.changes.answered import Rating, Watchers
from headrace.router.changes.scorers import Scorers
from headrace.router.changes.status import Status
from headrace.router.chooser import Chooser
from headrace.router.figures import Figures
from headrace.router.figures import add as add_figures
from headrace.router.measuring import Measured, Measuring
from headrace.router.optional import optional
from headrace.router.own_calls import OwnCalls
from headrace.router.permissions import permit, permitted_tenant, sees_all_tenants
from headrace.router.quotas.admission import Quotas
from headrace.router.siblings import Siblings
from headrace.router.state.batcher_peer import hops_of
from headrace.router.state.bills import Bill
from headrace.router.state.feedback import Feedback, ambiguous
from headrace.router.state.tiers import Tiers
from headrace.routing.scoring.conversation import Turn
from headrace.routing.scoring.score import UNSCORED, Score
from headrace.runtime.security.identity import Identity, current
from headrace.runtime.serving.calls import Calls
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_service_pb2, multiplex_pb2
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.generation_service_pb2_grpc import GenerationServiceServicer
from headrace.v1.routing_service_pb2_grpc import RoutingServiceServicer
from headrace.validation import check_feedback, check_request

SERVICES = (
    *generation_service_pb2.DESCRIPTOR.services_by_name.values(),
    *routing.DESCRIPTOR.services_by_name.values(),
)

_tracer = trace.get_tracer("headrace.router")

_Context = grpc.aio.ServicerContext[Any, Any]


class RouterServicer(GenerationServiceServicer, RoutingServiceServicer):
    """The mesh, as its callers see it.

    calls              the calls of the server, which requests on shared streams count among
    default_deadline   seconds for a request without a deadline
    failover_seconds   how long an answer that lost its batcher waits for another one of its tier
    tenants            most tenants that metrics name
    quotas             the limits of tenants; None: there are none
    watchers           of decisions and their outcomes; None: nobody watches
    shadow_bill        of the router's own requests; None: it sends none
    """

    def __init__(
        self,
        tiers: Tiers,
        scorers: Scorers,
        chooser: Chooser,
        feedback: Feedback,
        calls: Calls,
        siblings: Siblings,
        figures: Figures,
        status: Status,
        *,
        default_deadline: float,
        failover_seconds: float = 10.0,
        tenants: int = 20,
        quotas: Quotas | None = None,
        watchers: Watchers | None = None,
        shadow_bill: Bill | None = None,
    ) -> None:
        self._watchers = Watchers() if watchers is None else watchers
        self._measuring = Measuring(
            (tier.name for tier in tiers.tiers),
            tenants=tenants,
            class_of=None if quotas is None else quotas.tenant_class,
        )
        self._multiplexer = Multiplexer(self.answer, calls)
        self._own_calls = OwnCalls()
        self._tiers = tiers
        self._scorers = scorers
        self._chooser = chooser
        self._feedback = feedback
        self._siblings = siblings
        self._figures = figures
        self._status = status
        self._default_deadline = default_deadline
        self._failover_seconds = failover_seconds
        self._quotas = quotas
        self._total, self._shadow_total = self._new_bill(), shadow_bill
        siblings.on_ask("feedback", self._rate_if_known)
        siblings.on_ask("unrated", self._has_unrated)
        siblings.on_ask("bill", self._bill)
        siblings.on_ask("shadow_bill", self._shadow_bill)

    async def Generate(  # type: ignore[override] # the stub knows generators only; a coroutine may write, too
        self, request: pb.GenerateRequest, context: _Context
    ) -> None:
        """Send the prompt to the tier that fits it, and stream its answer."""
        metadata = context.invocation_metadata() or ()
        with self._own_calls.counted(context.write) as write:
            await self.answer(Incoming(request, context.time_remaining(), current(), metadata), write)

    async def Multiplex(  # type: ignore[override] # as above
        self, request_iterator: AsyncIterator[multiplex_pb2.MultiplexRequest], context: _Context
    ) -> None:
        """Serve many requests on one stream."""
        await self._multiplexer.serve(context)

    async def answer(self, incoming: Incoming, write: Write) -> None:
        """Answer one request through *write*. Raises the error that ends it."""
        left = incoming.time_remaining
        with self._measuring.request(incoming.request, incoming.identity, left) as measured:
            await self._admit(incoming, write, measured)

    async def _admit(self, incoming: Incoming, write: Write, measured: Measured) -> None:
        """Check a request, and answer it within the limits of its tenant."""
        request = incoming.request
        turns = _checked(request, incoming.identity)
        hops = hops_of(incoming.metadata)
        pin_token_ids(request, self._tiers.tiers)
        admission, bill = None, self._new_bill()
        if self._quotas is not None:
            admission = await self._quotas.admit(incoming.identity, request)
        try:
            await self._forward(incoming, turns, hops, bill, write, measured)
        finally:
            if admission is not None:
                admission.end(bill)

    async def _forward(
        self,
        incoming: Incoming,
        turns: Sequence[Turn],
        hops: int,
        bill: Bill,
        write: Write,
        measured: Measured,
    ) -> None:
        """Send an admitted request to a tier and its answer to *write*. Adds what it used to *bill*."""
        request, left = incoming.request, incoming.time_remaining
        hints = request.routing
        arm = self._scorers.arm_of(hints.tenant, hints.session_id, request.request_id)
        journey = measured.journey = Journey(
            request,
            self._score(turns, hints, arm),
            deadline=Deadline.after(self._default_deadline if left is None else left, time.monotonic()),
            hops=hops,
            flusher=None if incoming.framed or chooses_flushing(request) else self._own_calls.flusher,
            failover_seconds=self._failover_seconds,
            tiers=self._tiers,
            chooser=self._chooser,
            feedback=self._feedback,
            bill=bill,
            timing=measured.timing,
            turns=turns,
            scorer=self._scorers.fingerprint(arm),
            watchers=self._watchers,
            arm=arm,
            writer=write if isinstance(write, EventWriter) else None,
        )
        trace.get_current_span().set_attribute(attributes.REQUEST_ID, journey.outgoing.request.request_id)
        try:
            async with aclosing(journey.answer()) as responses:
                async for response in responses:
                    await write(response)
        finally:
            with optional("bill"):
                self._total.add(bill)

    async def Explain(self, request: routing.ExplainRequest, context: _Context) -> routing.ExplainResponse:
        """Return the tier that a request would be sent to, and why."""
        turns = _checked(request.request, current())
        pin_token_ids(request.request, self._tiers.tiers)
        if self._quotas is not None:
            await self._quotas.admit_dry_run(current(), request.request)
        hints, request_id = request.request.routing, request.request.request_id
        arm = ""  # one that chance would draw cannot be explained
        if hints.session_id or request_id:
            arm = self._scorers.arm_of(hints.tenant, hints.session_id, request_id)
        score = self._score(turns, hints, arm)
        facts = routing_request(request.request, score, arm)
        now = time.monotonic()
        decision = self._chooser.choose(facts, now)
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
            cascade=self._chooser.holds_back(facts, decision, now),
        )

    async def ListTiers(
        self, request: routing.ListTiersRequest, context: _Context
    ) -> routing.ListTiersResponse:
        """Return all tiers, smallest first, as last polled, and the bill of all requests."""
        response = routing.ListTiersResponse(tiers=[self._tier(tier.name) for tier in self._tiers.tiers])
        # The other processes are asked everything at once: one that does not answer delays the reply once.
        async with asyncio.TaskGroup() as questions:
            figures = questions.create_task(self._figures.of_tiers())
            if sees_all_tenants(current()):
                questions.create_task(self._add_bill(response.bill, self._total, "bill"))
                if self._shadow_total is not None:
                    questions.create_task(
                        self._add_bill(response.shadow_bill, self._shadow_total, "shadow_bill")
                    )
                questions.create_task(self._add_changes(response))
        for tier in response.tiers:
            add_figures(tier.figures, figures.result()[tier.name])
        return response

    async def _add_changes(self, response: routing.ListTiersResponse) -> None:
        response.changes.CopyFrom(await self._status.changes())

    async def _add_bill(self, message: pb.Bill, own: Bill, topic: str) -> None:
        """Set *message* to a bill of this process and the same of the others."""
        total = self._new_bill()
        for bill in (own, *await self._siblings.ask_all(topic)):
            total.add(bill)
        message.CopyFrom(bill_message(total))

    async def _shadow_bill(self) -> Bill | None:
        """Return the bill of the own requests of this process."""
        return self._shadow_total

    async def _bill(self) -> Bill:
        """Return the bill of all requests of this process."""
        return self._total

    async def Feedback(self, request: routing.FeedbackRequest, context: _Context) -> routing.FeedbackResponse:
        """Record how good an answer was."""
        check_feedback(request)
        request.tenant = permitted_tenant(request.tenant, current(), field="tenant")
        names = [tier.name for tier in self._tiers.tiers]
        if request.tier and request.tier not in names:
            raise errors.UnknownTier(
                f"tier is {quoted(request.tier)}; the tiers are {', '.join(names)}", field="tier"
            )
        elsewhere = not request.answer_id and await self._is_unrated_elsewhere(request)
        unknown: errors.UnknownRequest | None = None
        if not elsewhere:
            try:
                return await self._rate(request, current())
            except errors.UnknownRequest as error:
                unknown = error
        # The answer may have been given by another process of this router.
        response = await self._siblings.ask("feedback", request, current(), elsewhere)
        if response is None:
            raise unknown or errors.UnknownRequest("the process that gave the answer has ended")
        return cast("routing.FeedbackResponse", response)

    async def _is_unrated_elsewhere(self, request: routing.FeedbackRequest) -> bool:
        """Whether another process has the one answer to a request id that has no outcome.

        Raises InvalidRequest if several processes have one.
        """
        id, tenant = request.request_id, request.tenant
        others = await self._siblings.ask_all("unrated", id, tenant)
        if len(others) + self._feedback.has_unrated(id, tenant) > 1:
            raise ambiguous(id, tenant)
        return bool(others)

    async def _has_unrated(self, request_id: str, tenant: str) -> bool | None:
        """Whether this process has an answer to a request id without an outcome; None if it has not."""
        return self._feedback.has_unrated(request_id, tenant) or None

    async def _rate_if_known(
        self, request: routing.FeedbackRequest, rater: Identity, only_unrated: bool
    ) -> routing.FeedbackResponse | None:
        """Record feedback that a sibling received; return None if it is not about an answer of this process.

        only_unrated   answers that have an outcome are not meant
        """
        if only_unrated and not self._feedback.has_unrated(request.request_id, request.tenant):
            return None
        try:
            return await self._rate(request, rater)
        except errors.UnknownRequest:
            return None

    async def _rate(self, request: routing.FeedbackRequest, rater: Identity) -> routing.FeedbackResponse:
        """Record how good an answer of this process was."""
        quality = float(request.ok) if request.HasField("ok") else request.quality
        tenant = request.tenant
        answer = self._feedback.recall(
            answer_id=request.answer_id, request_id=request.request_id, tenant=tenant
        )
        rated_before = answer.quality is not None
        kept = await self._feedback.rate(
            answer, request.tier or answer.tier, quality, tenant=tenant, rater=rater
        )
        if not rated_before:
            verdict = "good" if quality >= 0.5 else "not_good"
            catalogue.FEEDBACK.of(tier=answer.tier, verdict=verdict).add()
            rating = Rating(tenant, answer.request_id, answer.tier, quality, answer_id=answer.answer_id)
            self._watchers.rated(rating)
        return routing.FeedbackResponse(kept=kept, tier=answer.tier)

    def _score(self, turns: Sequence[Turn], hints: pb.Routing, arm: str) -> Score:
        """Score a prompt or a conversation for an arm; return `UNSCORED` without turns, or if it fails.

        What is remembered of the conversation stands for turns that the caller did not send.
        """
        if not turns:
            return UNSCORED
        span = _tracer.start_span(attributes.SPAN_SCORE)  # not the current one: nothing below starts a span
        try:
            with optional("scorer"):
                earlier = self._chooser.earlier(hints.tenant, hints.session_id, time.monotonic())
                score = self._scorers.score_turns(turns, earlier, arm=arm)
                if not 0 <= score.value <= 1:  # also true of NaN
                    raise ValueError("the score is not between 0 and 1")
                span.set_attribute(attributes.SCORE, score.value)
                return score
        finally:
            span.end()
        return UNSCORED

    def _tier(self, name: str) -> routing.Tier:
        tier = routing.Tier()
        tier.CopyFrom(self._tiers[name].reported)
        if (price := self._chooser.prices.get(name)) is not None:
            tier.price.prompt, tier.price.completion = price.prompt, price.completion
            if price.cached_prompt is not None:
                tier.price.cached_prompt = price.cached_prompt
        return tier

    def _new_bill(self) -> Bill:
        return Bill([tier.name for tier in self._tiers.tiers], self._chooser.prices)


def _checked(request: pb.GenerateRequest, identity: Identity) -> list[Turn]:
    """Check a request, and return the turns to score. Raises InvalidRequest or Forbidden.

    The texts that the check decoded are not kept while the request waits.
    """
    texts = check_request(request)
    permit(request, identity)
    return turns_of(request, texts)
