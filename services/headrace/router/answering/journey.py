"""Follow one request on its way: where it was sent, what is judged of it, what it used."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence

from opentelemetry import metrics, trace

from headrace import attributes
from headrace.router.answering import replies
from headrace.router.answering.cascade import Draft, Judge, Sampler
from headrace.router.chooser import Asked, Chooser
from headrace.router.optional import optional
from headrace.router.state.bills import Bill
from headrace.router.state.tiers import Tier, Tiers
from headrace.routing.policy import Decision, Hints
from headrace.routing.score import UNSCORED, Score
from headrace.v1 import generation_pb2 as pb

_tracer = trace.get_tracer("headrace.router")
_meter = metrics.get_meter("headrace.router")
_routed = _meter.create_counter(
    attributes.METRIC_ROUTED, description="requests, by the tier that they were sent to"
)
_drafts = _meter.create_counter(
    attributes.METRIC_DRAFTS, description="drafts that were judged, by tier and outcome"
)


class Journey:
    """One request on its way.

    ends      time.monotonic() of its deadline
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
        self.text = text_of(request)
        self.asked = asked_of(request, score)
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
            with optional("thresholds"):
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
        with optional("draft check"):
            return self._judge(sample)
        return None

    def _judge(self, sample: Callable[[str], AsyncGenerator[pb.GenerateResponse, None]]) -> Judge | None:
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
        """Whether the draft may be released; one that cannot be judged may, as without a judge."""
        outcome = "unjudged"
        with _tracer.start_as_current_span(attributes.SPAN_CHECK) as span, optional("draft check"):
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
        return outcome != "escalated"

    def took(self, tier: str) -> None:
        """Book that a batcher of *tier* was asked."""
        with optional("bill"):
            self.bill.asked(tier)

    def _sampled(self, sample: Draft) -> None:
        self.bill.sampled(
            sample.tier,
            prompt_tokens=sample.prompt_tokens,
            tokens=sample.tokens,
            cached_tokens=sample.cached_tokens,
        )

    def gave_up(self, draft: Draft, tier: str) -> None:
        """Book a draft that nobody gets; *tier* answers in its place, nobody if it is empty."""
        with optional("bill"):
            self.bill.wasted(
                draft.tier,
                prompt_tokens=draft.prompt_tokens,
                tokens=draft.tokens,
                cached_tokens=draft.cached_tokens,
            )
        if tier:
            with optional("thresholds"):
                self._chooser.note_escalation(self.asked, draft.tier, tier)

    def pass_on(self, response: pb.GenerateResponse) -> None:
        """Make an event the caller's."""
        event = response.WhichOneof("event")
        if event == "accepted":
            if self.asked.scored:
                response.accepted.score = self.asked.score
            self.accepted = response.accepted
            # A draft that was released although it was no good is still where it was made.
            self.tier = response.accepted.tier or self.tier
            with optional("sessions"):
                self._chooser.answered(self.asked, self.tier, time.monotonic())
        elif event == "delta":
            self._delivered += response.delta.token_count
            if not self._shows_logprobs:
                del response.delta.logprobs[:]
        elif event == "finish":
            self._finish(response.finish)

    def _finish(self, finish: pb.Finish) -> None:
        """Book the answer, and put the bill of all tiers in place of what a router behind us made out."""
        usage = finish.usage
        with optional("bill"):
            # Waste of drafts that were given up is booked with their own tiers.
            given_up = sum(charge.wasted_tokens for _, charge in self.bill.charges)
            wasted = max(usage.wasted_tokens - given_up, 0)
            self._answered(usage.prompt_tokens, self._delivered, wasted, usage.cached_tokens)
            if more := replies.more_prompt_tokens(finish):
                self.bill.sampled(self.tier, prompt_tokens=more, tokens=0)
        finish.ClearField("bill")
        with optional("bill"):
            finish.bill.CopyFrom(bill_message(self.bill))
        with optional("pace"):
            self._chooser.finished(self.tier, finish, self._delivered, time.monotonic())

    def close(self) -> None:
        """Book what was delivered of an answer that broke off."""
        if self.accepted is not None and not self._finished:
            with optional("bill"):
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


def text_of(request: pb.GenerateRequest) -> str:
    """What the score reads: the raw prompt, or what the user said last.

    The system prompt and earlier turns are left out: the same for many requests, they would say more
    about the application than about the question.
    """
    if request.HasField("chat"):
        messages = request.chat.messages
        last = next((turn for turn in reversed(messages) if turn.role == "user"), messages[-1])
        return last.content
    return request.prompt


def asked_of(request: pb.GenerateRequest, score: Score) -> Asked:
    """What a request brings to the decision."""
    hints = request.routing
    return Asked(
        score=score.value,
        scored=score is not UNSCORED,
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


def bill_message(bill: Bill) -> pb.Bill:
    """A bill as callers get it."""
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
