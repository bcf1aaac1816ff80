"""Follow one request through the router: the tiers that it visits, its answer, and its bill.

`Journey` implements `attempts.Routed` and `cascade.Cascaded`: those modules forward the request and hold back
drafts, and ask the journey for decisions.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing

from opentelemetry import trace

from headrace import attributes, errors
from headrace.deadline import Deadline
from headrace.flushing import Flusher
from headrace.metrics import catalogue
from headrace.metrics.requests import Timing, finish_name
from headrace.multiplex.outbox import EventWriter
from headrace.router.answering import replies
from headrace.router.answering.attempts import Outgoing, across_tiers
from headrace.router.answering.cascade import Draft, HoldBack, cascade, is_structured
from headrace.router.answering.facts import routing_request
from headrace.router.answering.prompts import digest_of, text_of
from headrace.router.answering.used_tokens import UsedTokens
from headrace.router.billing import bill_message
from headrace.router.changes.answered import Answered, Beginning, Watchers
from headrace.router.chooser import Chooser
from headrace.router.optional import optional
from headrace.router.state.bills import Bill
from headrace.router.state.feedback import AnswerRecord, Feedback
from headrace.router.state.tiers import Tier, Tiers
from headrace.routing.policy import Decision
from headrace.routing.scoring.conversation import Turn
from headrace.routing.scoring.score import Score
from headrace.v1 import generation_pb2 as pb

_tracer = trace.get_tracer("headrace.router")


class Journey:
    """One request on its way.

    outgoing  the request as it is sent to batchers
    bill      what it used so far
    finish    why its answer is complete, such as "stop"; empty until it is
    timing    of the answer, as the caller receives it

    writer    writes events to the caller, besides those that `answer` streams; None: all are streamed
    """

    def __init__(
        self,
        request: pb.GenerateRequest,
        score: Score,
        *,
        deadline: Deadline,
        hops: int,
        flusher: Flusher | None,
        failover_seconds: float,
        tiers: Tiers,
        chooser: Chooser,
        feedback: Feedback,
        bill: Bill,
        timing: Timing,
        turns: Sequence[Turn],
        scorer: str,
        watchers: Watchers,
        arm: str = "",
        writer: EventWriter | None = None,
    ) -> None:
        self._turns, self._score, self._scorer = turns, score, scorer
        self._facts = routing_request(request, score, arm)
        self._shows_logprobs = request.sampling.logprobs
        # Two answers in a form are not compared: the comparison is made for texts.
        self._has_form = is_structured(request) or bool(request.chat.tools)
        # The details of the prompt belong to the model that answers, and its prompt is computed as a whole: a
        # draft would compute it once more.
        self._may_draft = chooser.rules.allow(self._facts) and not request.sampling.HasField(
            "prompt_logprobs"
        )
        # Only tiers whose answers may be drafts are asked for log-probabilities: a service outside of the
        # mesh may have none.
        self._checks_logprobs = self._may_draft and not self._shows_logprobs
        # A draft may be held back.
        direct = None if writer is None or self._may_draft else _Direct(self._deliver, writer)
        self.outgoing = Outgoing(_outgoing(request), deadline, failover_seconds, hops, flusher, direct)
        self.bill = bill
        self.finish = ""
        self._watchers = watchers
        self._watched = Beginning() if watchers.wants_text(self.outgoing.request, self._facts) else None
        self._first_decision: Decision | None = None
        self._timing = timing
        self._tiers = tiers
        self._chooser = chooser
        self._feedback = feedback
        self._decision: Decision | None = None
        self._tier = ""  # where the request is now
        self._accepted: pb.Accepted | None = None
        self._used = UsedTokens()  # of what is delivered
        self._billed = False

    @property
    def tier(self) -> str:
        """The tier that answers, or where the request is now."""
        return self._tier

    @property
    def model(self) -> str:
        """The model that answers; empty until one does."""
        return self._accepted.model if self._accepted is not None else ""

    async def answer(self) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Stream the answer as the caller receives it, except what goes to the writer."""
        responses = cascade(self) if self._may_draft else across_tiers(self)
        try:
            async with aclosing(responses):
                async for response in responses:
                    self._deliver(response)
                    yield response
        finally:
            self._bill_partial_answer()

    def ended(self, outcome: str, seconds: float) -> None:
        """Report to the watchers that the request has ended.

        outcome   "ok", or the class of the error
        seconds   since the request arrived
        """
        self._watchers.answered(
            Answered(
                request=self.outgoing.request,
                turns=self._turns,
                score=self._score,
                facts=self._facts,
                decision=self._first_decision,
                tier=self._tier,
                finish=self.finish,
                outcome=outcome,
                text=self._watched.text if self._watched is not None else "",
                bill=self.bill,
                seconds=seconds,
                answer_id=self._accepted.answer_id if self._accepted is not None else "",
                scorer=self._scorer,
            )
        )

    # For `attempts`.

    def choose(self, rejected: Sequence[str], failed: Collection[str]) -> Tier:
        """See `attempts.Routed`."""
        decision = self._chooser.choose(
            self._facts,
            time.monotonic(),
            deadline=self.outgoing.deadline,
            failed=failed,
            rejected=rejected,
        )
        if self._decision is None:
            with optional("exploration"):
                decision = self._chooser.explore(self._facts, decision)
            self._first_decision = decision
            with optional("thresholds"):
                self._chooser.record_decision(self._facts, decision)
            with optional("budget"):
                self._chooser.record_expected_cost(decision)
        self._decision = decision
        self._tier = decision.tier
        if self._checks_logprobs:
            sampling = self.outgoing.request.sampling
            sampling.ClearField("logprobs")
            if decision.escalations:
                sampling.logprobs = True
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attributes(
                {
                    attributes.SCORE: self._facts.score,
                    attributes.TIER: decision.tier,
                    attributes.ROUTE_REASON: decision.why,
                }
            )
        catalogue.ROUTED.of(tier=decision.tier, route="draft" if rejected else decision.cause).add()
        return self._tiers[decision.tier]

    def count_attempt(self, tier: str) -> None:
        """See `attempts.Routed`."""
        with optional("bill"):
            self.bill.add_attempt(tier)

    def drop_logprobs(self, error: errors.InvalidRequest) -> bool:
        """See `attempts.Routed`."""
        rejected = self._checks_logprobs and error.field == "sampling.logprobs"
        if rejected:
            self._checks_logprobs = False
            self.outgoing.request.sampling.ClearField("logprobs")
        return rejected

    async def wait_for_recovery(self, failed: Collection[str], began: float) -> bool:
        """See `attempts.Routed`."""
        return await self._tiers.wait_for_recovery(failed, began)

    # For `cascade`.

    def hold_back(self) -> HoldBack | None:
        """See `cascade.Cascaded`."""
        with optional("draft check"):
            assert self._decision is not None, "an answer begins after a decision"
            now, deadline, rules = time.monotonic(), self.outgoing.deadline, self._chooser.rules
            if self._chooser.holds_back(self._facts, self._decision, now, deadline):
                samples = not self._has_form and self._chooser.draws_sample(
                    self._facts, self._decision, now, deadline
                )
                sample_seconds = rules.sample_seconds if samples else 0.0
                return HoldBack(self._tiers[self._tier], rules.draft_tokens, sample_seconds)
        return None

    def releases(self, draft: Draft) -> bool:
        """See `cascade.Cascaded`. A draft that cannot be checked is released."""
        verdict = "unchecked"
        with _tracer.start_as_current_span(attributes.SPAN_CHECK) as span, optional("draft check"):
            released, reasons = self._check_form(draft) if draft.has_form else self._check_text(draft)
            verdict = "released" if released else "escalated"
            span.set_attributes(
                {
                    attributes.TIER: draft.tier,
                    attributes.CHECK_REASONS: reasons,
                    attributes.VERDICT: verdict,
                }
            )
        catalogue.DRAFTS.of(tier=draft.tier, verdict=verdict).add()
        return verdict != "escalated"

    def _check_text(self, draft: Draft) -> tuple[bool, list[str]]:
        """Return whether a draft in free text is released, and what was found against it."""
        text, finished = draft.text_to_check()
        released, check = self._chooser.check_draft(
            text_of(self.outgoing.request),
            text,
            finished=finished,
            logprobs=draft.logprobs,
            quality_preference=self._facts.hints.quality_preference,
            samples=draft.samples,
        )
        trace.get_current_span().set_attribute(attributes.CHECK_GOOD, check.good)
        return released, list(check.reasons)

    def _check_form(self, draft: Draft) -> tuple[bool, list[str]]:
        """Return whether a draft in a form is released, and what was found against it."""
        is_json = self.outgoing.request.sampling.WhichOneof("structured") in ("json_schema", "json_object")
        if found := draft.form_fault(is_json=is_json):
            return False, [found]
        if not draft.logprobs:
            return True, []
        released, check = self._chooser.check_certainty(
            draft.logprobs, quality_preference=self._facts.hints.quality_preference
        )
        trace.get_current_span().set_attribute(attributes.CHECK_GOOD, check.good)
        return released, list(check.reasons)

    def discard(self, draft: Draft, replaced_by: str = "") -> None:
        """See `cascade.Cascaded`."""
        with optional("bill"):
            add = self.bill.add_sample if draft.is_sample else self.bill.add_draft
            add(
                draft.tier,
                prompt_tokens=draft.used.prompt_of(self.outgoing.request),
                tokens=draft.tokens,
                cached_tokens=draft.cached_tokens,
            )
        catalogue.WASTED_TOKENS.of(tier=draft.tier, cause="draft").add(draft.tokens)
        if replaced_by:
            with optional("thresholds"):
                self._chooser.record_escalation(self._facts, draft.tier, replaced_by)

    # What the caller receives.

    def _deliver(self, response: pb.GenerateResponse) -> None:
        """Complete an event for the caller, and record it."""
        event = response.WhichOneof("event")
        if event == "delta":
            delta = response.delta
            if count := delta.token_count:
                self._used.completion += count
                self._timing.add(count, time.monotonic())
            if self._watched is not None:
                self._watched.add(delta.text)
            if not self._shows_logprobs:
                delta.ClearField("logprobs")
        elif event == "accepted":
            self._accept(response.accepted)
        elif event == "finish":
            self._finish(response.finish)

    def _accept(self, accepted: pb.Accepted) -> None:
        if self._facts.scored:
            accepted.score = self._facts.score
        accepted.answer_id = uuid.uuid4().hex
        self._accepted = accepted
        self._used.accept(accepted)
        # If a rejected draft is released, its tier is not the one that was chosen last.
        self._tier = accepted.tier or self._tier
        with optional("conversations"):
            self._chooser.record_answer(self._facts, self._tier, time.monotonic())
        with optional("feedback"):
            self._feedback.remember(
                AnswerRecord(
                    accepted.answer_id,
                    self.outgoing.request.request_id,
                    self._tier,
                    self._facts.score if self._facts.scored else None,
                    self._turns,
                    self._scorer,
                    self._facts.arm,
                    asked=digest_of(self.outgoing.request),
                ),
                tenant=self._facts.tenant,
            )

    def _finish(self, finish: pb.Finish) -> None:
        """Bill the answer; the bill of all tiers replaces the bill of a router behind this one."""
        usage = finish.usage
        self.finish = finish_name(finish.reason)
        self._used.finish(usage)
        with optional("bill"):
            # The waste of discarded drafts is billed to their own tiers.
            discarded = sum(charge.wasted_tokens for _, charge in self.bill.charges)
            wasted = max(usage.wasted_tokens - discarded, 0)
            prompt = self._bill_answer(wasted, usage.cached_tokens)
            if repeated := replies.repeated_prompt_tokens(finish, prompt):
                self.bill.add_sample(self._tier, prompt_tokens=repeated, tokens=0)
        finish.ClearField("bill")
        with optional("bill"):
            finish.bill.CopyFrom(bill_message(self.bill))
        with optional("pace"):
            self._chooser.record_speed(self._tier, finish, self._used.completion, time.monotonic())
        if self._decision is not None:
            with optional("usage"):
                self._chooser.record_usage(self._facts, self._decision, self._tier, usage)

    def _bill_partial_answer(self) -> None:
        """Bill what was delivered of an answer that did not finish."""
        if self._accepted is not None and not self._billed:
            with optional("bill"):
                self._bill_answer()

    def _bill_answer(self, wasted_tokens: int = 0, cached_tokens: int = 0) -> int:
        """Bill what was delivered. Returns the tokens of the prompt."""
        self._billed = True
        prompt = self._used.prompt_of(self.outgoing.request)
        self.bill.add_answer(
            self._tier,
            prompt_tokens=prompt,
            tokens=self._used.completion,
            wasted_tokens=wasted_tokens,
            cached_tokens=cached_tokens,
        )
        return prompt


class _Direct:
    """See `attempts.Direct`."""

    __slots__ = ("_complete", "_writer")

    def __init__(self, complete: Callable[[pb.GenerateResponse], None], writer: EventWriter) -> None:
        self._complete = complete
        self._writer = writer

    @property
    def ready(self) -> bool:
        """See `attempts.Direct`."""
        return self._writer.ready

    def deliver(self, response: pb.GenerateResponse) -> None:
        """See `attempts.Direct`."""
        self._complete(response)
        self._writer.write_now(response)


def _outgoing(request: pb.GenerateRequest) -> pb.GenerateRequest:
    """Return the request for batchers, with id and seed."""
    outgoing = pb.GenerateRequest()
    outgoing.CopyFrom(request)
    outgoing.request_id = request.request_id or str(uuid.uuid4())
    if not outgoing.sampling.HasField("seed"):
        outgoing.sampling.seed = secrets.randbits(64)
    if not outgoing.sampling.logprobs:
        outgoing.sampling.ClearField("logprobs")
    return outgoing
