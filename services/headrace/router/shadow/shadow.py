"""Answer a sample of requests a second time, by the other choice, and have both answers compared.

The other choice is a fixed tier, or what another scorer or other thresholds would have chosen. A request is
sent again after its caller has the answer, so the caller never waits for it and never receives any of it.
`bounds.py` bounds rate and cost; a request beyond a bound is skipped, not queued. A caller who excludes a
tier by hints also excludes it here.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol, Self

from opentelemetry import trace

from headrace import attributes, errors
from headrace.metrics import changes
from headrace.metrics.requests import CANCELLED, End
from headrace.router.answering.cascade import is_structured
from headrace.router.changes.answered import Answered, Rating, Watchers
from headrace.router.costs.weighing import Weighing
from headrace.router.optional import optional
from headrace.router.shadow.bounds import Bounds
from headrace.router.shadow.judge import Judge
from headrace.router.shadow.own_requests import OwnAnswer, OwnRequests, shadow_request
from headrace.router.state.bills import Bill
from headrace.router.state.feedback import AnswerRecord, Feedback
from headrace.router.state.thresholds import Thresholds
from headrace.router.state.tiers import Tiers
from headrace.routing.changes.candidates import allowed, floor_of, would_choose
from headrace.routing.changes.judging import UNJUDGED, Pair, Verdict
from headrace.routing.policy import place_for
from headrace.routing.request import RoutingRequest
from headrace.routing.scoring.score import Scorer
from headrace.v1 import generation_pb2 as pb

_tracer = trace.get_tracer("headrace.router")

RUBRIC_TOKENS = 200  # of a question to a judge model, about, without request and answers
MAX_DRAWN = 10_000  # drawn requests that have not ended


class Choice(Protocol):
    """The other choice that the shadow tries."""

    def tier(self, answered: Answered, *, drawn: bool) -> str:
        """Return the tier of the other choice for a request, of which only *drawn* ones are sent."""
        ...


class FixedTier:
    """The same tier for all requests."""

    def __init__(self, name: str) -> None:
        self._name = name

    def tier(self, answered: Answered, *, drawn: bool) -> str:
        """See `Choice`."""
        return self._name


class Candidate:
    """What another scorer or other thresholds would choose.

    scorer      None: the score of the request is used
    thresholds  in its place; if they are adapted to shares, they are so for the candidate's own scores
    adapted     whether they are
    weighing    of the expected quality and cost, if the scorer estimates them; None: it chooses by score
    """

    def __init__(
        self,
        scorer: Scorer | None,
        thresholds: Thresholds,
        *,
        adapted: bool,
        weighing: Weighing | None = None,
    ) -> None:
        self._scorer = scorer
        self._weighing = weighing
        self._thresholds = thresholds
        self._adapted = adapted

    def tier(self, answered: Answered, *, drawn: bool) -> str:
        """See `Choice`. With shares, every request that counts is scored, because shares are of all."""
        decision, facts = answered.decision, answered.facts
        counts = self._adapted and facts.counts
        if decision is None or not (drawn or counts):
            return ""
        if self._scorer is not None:
            made = self._scorer.score_turns(answered.turns)
            facts = replace(facts, score=made.value, continues=made.continues, estimates=made.estimates)
        thresholds = self._thresholds.now()
        if counts:
            self._thresholds.record(facts.score, place_for(facts.score, thresholds))
        weighed = None if self._weighing is None else self._weighing.weigh(facts, floor_of(decision))
        return would_choose(decision, facts.score, facts.hints, thresholds, weighed)


class Shadow:
    """Watches requests, and answers a sample of them by the other choice.

    share       of answered requests that are drawn, 0 to 1
    judge       compares the answers; None: they are not compared
    watchers    of the judge's ratings
    draw        returns the random numbers, uniform in [0, 1)
    """

    def __init__(
        self,
        tiers: Tiers,
        choice: Choice,
        own: OwnRequests,
        bounds: Bounds,
        judge: Judge | None,
        feedback: Feedback,
        watchers: Watchers,
        *,
        share: float,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._tiers = tiers
        self._choice = choice
        self.own = own
        self._bounds = bounds
        self._judge = judge
        self._feedback = feedback
        self._watchers = watchers
        self._share = share
        self._draw = draw
        # By the id of the object, which is its own while the object is kept here.
        self._drawn: OrderedDict[int, pb.GenerateRequest] = OrderedDict()
        self._group: asyncio.TaskGroup | None = None  # while it is running
        self._running: set[asyncio.Task[None]] = set()
        self._places = {tier.name: place for place, tier in enumerate(tiers.tiers)}

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Self, None]:
        """Send requests while the block runs. When it is left, those in flight are cancelled."""
        async with asyncio.TaskGroup() as self._group:
            try:
                yield self
            finally:
                self._group = None
                for task in self._running:
                    task.cancel()

    # A watcher.

    def wants_text(self, request: pb.GenerateRequest, facts: RoutingRequest) -> bool:
        """Draw requests; the text is needed of those whose answers are compared.

        Token ids are of one model, and have no text for a judge. Judges compare texts: not answers in a form,
        nor calls of tools.
        """
        if facts.resumes or request.HasField("token_ids") or self._draw() >= self._share:
            return False
        if self._judge is not None and (request.chat.tools or is_structured(request)):
            return False
        self._drawn[id(request)] = request
        if len(self._drawn) > MAX_DRAWN:
            self._drawn.popitem(last=False)
        return self._judge is not None

    def answered(self, answered: Answered) -> None:
        """Send a drawn request by the other choice, if that is another tier than the one that answered."""
        drawn = self._drawn.pop(id(answered.request), None) is not None
        tier = self._choice.tier(answered, drawn=drawn)
        complete = answered.outcome == "ok" and answered.finish and answered.decision is not None
        if not (drawn and complete and tier and tier != answered.tier):
            return
        assert answered.decision is not None, "it is complete"
        if tier not in allowed(answered.decision):
            return
        estimate, now = self._estimate(answered, tier), time.monotonic()
        bound = self._unable(tier) or self._bounds.reached(estimate, now, time.time())
        if bound is not None:
            changes.SHADOW_SKIPPED.of(bound=bound).add()
        elif self._group is not None:
            self._start(self._group, answered, tier, estimate)

    def _start(self, group: asyncio.TaskGroup, answered: Answered, tier: str, estimate: float) -> None:
        bill = self.own.new_bill()

        def ended(task: asyncio.Task[None]) -> None:
            self._running.discard(task)
            self._bounds.end(estimate, bill.known_cost, time.time())

        self._bounds.begin(estimate, time.monotonic())
        caller = trace.get_current_span().get_span_context()
        links = [trace.Link(caller)] if caller.is_valid else []
        # In a context of its own, which belongs to no request: its trace only links to the caller's.
        task = group.create_task(self._shadow(answered, tier, bill, links), context=contextvars.Context())
        self._running.add(task)
        task.add_done_callback(ended)

    def rated(self, rating: Rating) -> None:
        """See `Watcher`."""

    def _unable(self, tier: str) -> str | None:
        """Return why a tier gets no shadow request now: it cannot serve, or others would wait."""
        reported = self._tiers[tier].reported
        if not reported.healthy:
            return "tier"
        return "queue" if reported.load.queued else None

    def _estimate(self, answered: Answered, tier: str) -> float:
        """Return the expected cost: with as many tokens as the answer that there is."""
        charge = dict(answered.bill.charges).get(answered.tier)
        if charge is None:
            return 0.0
        prompt, completion = charge.prompt_tokens, charge.completion_tokens
        bill = self.own.new_bill()
        bill.add_attempt(tier)
        bill.add_answer(tier, prompt_tokens=prompt, tokens=completion)
        if self._judge is not None and self._judge.tier:
            bill.add_attempt(self._judge.tier)
            bill.add_sample(
                self._judge.tier, prompt_tokens=2 * (prompt + 2 * completion + RUBRIC_TOKENS), tokens=2
            )
        return bill.known_cost

    async def _shadow(self, answered: Answered, tier: str, bill: Bill, links: Sequence[trace.Link]) -> None:
        """Answer a request by *tier*, and compare the answers."""
        of_span = {attributes.TIER: tier, attributes.REQUEST_ID: answered.request.request_id}
        with (
            _tracer.start_as_current_span(attributes.SPAN_SHADOW, attributes=of_span, links=links) as span,
            optional("shadow"),
        ):
            answer = await self._answer(answered, tier, bill)
            if answer is None or self._judge is None:
                return
            verdict = await self._compare(self._judge, answered, tier, answer, bill)
            span.set_attribute(attributes.VERDICT, verdict.word)
            changes.SHADOW_VERDICTS.of(tier=tier, verdict=verdict.word).add()
            if verdict.word != "unjudged":
                await self._report(self._judge, answered, tier, verdict)

    async def _answer(self, answered: Answered, tier: str, bill: Bill) -> OwnAnswer | None:
        """Return the answer of *tier*; None if it fails."""
        end = CANCELLED
        try:
            answer = await self.own.send(tier, shadow_request(answered.request), bill)
            end = End.complete(answer.finish)
            return answer
        except errors.HeadraceError as error:
            end = End.by(error)
            return None
        finally:
            changes.SHADOW_REQUESTS.of(tier=tier, outcome=end.outcome).add()

    async def _compare(
        self, judge: Judge, answered: Answered, tier: str, answer: OwnAnswer, bill: Bill
    ) -> Verdict:
        """Have both answers compared; a judge model is not asked if it may not see them or cannot now."""
        assert answered.decision is not None, "it is complete"
        if judge.tier and (judge.tier not in allowed(answered.decision) or self._unable(judge.tier)):
            return UNJUDGED
        complete = (answered.finish != "length", answer.finish != "length")
        pair = Pair(answered.turns, answered.text, answer.text, complete)
        larger = self._places[tier] > self._places[answered.tier]
        try:
            return await judge.judge(pair, answered.request, bill, larger=larger)
        except errors.HeadraceError:
            return UNJUDGED

    async def _report(self, judge: Judge, answered: Answered, tier: str, verdict: Verdict) -> None:
        """Write a verdict to the feedback file, and report the outcome of the caller's answer."""
        facts, request_id = answered.facts, answered.request.request_id
        outcomes = {f"{answered.tier}_ok": verdict.first, f"{tier}_ok": verdict.second}
        record = AnswerRecord(
            answered.answer_id,
            request_id,
            answered.tier,
            facts.score if facts.scored else None,
            answered.turns,
            answered.scorer,
            facts.arm,
        )
        found = {name: outcome for name, outcome in outcomes.items() if outcome is not None}
        row = {"judge": judge.name, "shadow": tier, "verdict": verdict.word, **found}
        await self._feedback.keep_judged(record, row, tenant=facts.tenant)
        if verdict.first is not None:
            self._watchers.rated(
                Rating(
                    facts.tenant,
                    request_id,
                    answered.tier,
                    verdict.first,
                    source="judge",
                    answer_id=answered.answer_id,
                    shadow=None if verdict.second is None else (tier, verdict.second),
                )
            )
