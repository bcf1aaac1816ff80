"""Choose tiers for live requests: applies `routing` to the current state of the router.

That state is the health and load of the tiers, the thresholds in force, prices, the speed of each tier, and
the last score and tier of each conversation. Time is an argument; nothing here waits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence

from headrace import errors
from headrace.deadline import NEVER, Deadline
from headrace.router.costs.weighing import Weighing
from headrace.router.optional import optional
from headrace.router.state.conversations import Conversations
from headrace.router.state.thresholds import Thresholds
from headrace.router.state.tier_pace import TierPace
from headrace.router.state.tiers import Tiers
from headrace.routing.changes import exploring
from headrace.routing.drafts.check import Check, DraftChecker
from headrace.routing.drafts.rules import CascadeRules
from headrace.routing.no_route import ConflictingHints, NoRoute, NoSuchModel, NoSuchTier
from headrace.routing.policy import Decision, decide
from headrace.routing.request import RoutingRequest
from headrace.routing.scoring.conversation import Earlier, remembered
from headrace.routing.success.choosing import Weighed
from headrace.routing.tier_view import Price, TierView
from headrace.v1 import generation_pb2 as pb

NO_TIER_RETRY_SECONDS = 1.0  # the delay that callers are advised if no tier can serve now

_ERRORS: dict[type[NoRoute], type[errors.HeadraceError]] = {
    NoSuchTier: errors.UnknownTier,
    NoSuchModel: errors.UnknownModel,
    ConflictingHints: errors.HintsConflict,
}


class Chooser:
    """Chooses tiers for requests, and records the results that later decisions depend on.

    explore   share of requests without pins whose tier is drawn at random
    draw      returns the random numbers for that, uniform in [0, 1)
    weighing  chooses by expected quality and cost where the scorer estimates them; None: by score alone
    """

    def __init__(
        self,
        tiers: Tiers,
        thresholds: Thresholds,
        checker: DraftChecker,
        *,
        prices: Mapping[str, Price] | None = None,
        conversations: Conversations | None = None,
        rules: CascadeRules | None = None,
        explore: float = 0.0,
        draw: Callable[[], float] = random.random,
        weighing: Weighing | None = None,
    ) -> None:
        self._tiers = tiers
        self._thresholds = thresholds
        self._checker = checker
        self._conversations = Conversations() if conversations is None else conversations
        self._paces = {tier.name: TierPace() for tier in tiers.tiers}
        self._names = [tier.name for tier in tiers.tiers]
        self.prices = dict(prices or {})
        self.rules = CascadeRules() if rules is None else rules
        self._explore = explore
        self._draw = draw
        self._weighing = weighing

    def choose(
        self,
        request: RoutingRequest,
        now: float,
        *,
        deadline: Deadline = NEVER,
        failed: Collection[str] = (),
        rejected: Sequence[str] = (),
    ) -> Decision:
        """Choose the tier for a request.

        failed     tiers that could not serve it
        rejected   tiers whose drafts were discarded, in this order: a larger tier than all of them is chosen,
                   or by estimates one that is more likely to answer well than the last

        Raises UnknownTier, UnknownModel, HintsConflict, and NoWorkers if no allowed tier can serve now.
        """
        reached = ""
        with optional("conversations"):
            reached = self._conversations.reached(request.tenant, request.session, now)
        floor = reached if request.keeps_tier else ""
        weighed = None
        if self._weighing is not None:
            with optional("estimates"):
                weighed = self._weighing.weigh(request, reached)
        too_small = self._not_better(rejected, weighed)
        try:
            return decide(
                request.score,
                request.hints,
                self._views(request, now),
                floor=floor,
                continues=request.continues,
                seconds_left=deadline.left(now),
                exclude=[*too_small, *failed],
                weighed=weighed,
            )
        except NoRoute as error:
            raise _as_error(error) from None

    def _not_better(self, rejected: Sequence[str], weighed: Weighed | None) -> list[str]:
        """Return the tiers that may not replace those whose drafts were rejected."""
        if not rejected:
            return []
        last = self._names.index(rejected[-1])
        if weighed is None:
            return self._names[: last + 1]
        better = weighed.better_than(last, range(len(self._names)))
        return [name for place, name in enumerate(self._names) if place not in better]

    def explore(self, request: RoutingRequest, decision: Decision) -> Decision:
        """Return the first decision about a request after chance, which may choose another tier."""
        if not self._explore or not exploring.may_explore(request):
            return decision
        return exploring.explore(decision, self._explore, self._draw())

    def record_decision(self, request: RoutingRequest, decision: Decision) -> None:
        """Record the first decision about a request for the tiers' shares."""
        if request.counts:
            place = decision.place if decision.explored else decision.wanted
            self._thresholds.record(request.score, place, request.arm)

    def record_expected_cost(self, decision: Decision) -> None:
        """Record the expected cost of a request about which the first decision was made, for the budget."""
        if self._weighing is not None and (weighed := decision.considered.weighed) is not None:
            self._weighing.expect(weighed.cost[decision.place])

    def record_escalation(self, request: RoutingRequest, before: str, after: str) -> None:
        """Record that tier *after* answered a request whose draft by tier *before* was discarded."""
        if request.counts:
            places = self._names.index(before), self._names.index(after)
            self._thresholds.record_escalation(*places, request.arm)

    def record_answer(self, request: RoutingRequest, tier: str, now: float) -> None:
        """Record that a tier began to answer.

        While the conversation continues, it stays there, or on a larger tier that it has reached.
        """
        if not request.session:
            return
        earlier = self.earlier(request.tenant, request.session, now)
        by_score = self._weighing is None or not self._weighing.estimated(request)
        if by_score and earlier is not None and (request.keeps_tier or request.carried is None):
            tier = max(earlier.tier, tier, key=self._names.index)
        self._conversations.record(
            request.tenant,
            request.session,
            remembered(earlier, request.score, request.carried, tier),
            now,
        )

    def earlier(self, tenant: str, session: str, now: float) -> Earlier | None:
        """Return what is remembered of a conversation; None if nothing."""
        return self._conversations.earlier(tenant, session, now)

    def record_usage(self, request: RoutingRequest, decision: Decision, tier: str, usage: pb.Usage) -> None:
        """Record the tokens of an answer to a request about which *decision* was made."""
        weighed = decision.considered.weighed
        if self._weighing is not None and weighed is not None:
            follows = weighed.previous == self._names.index(tier)
            self._weighing.record(request, tier, usage, follows=follows)

    def record_speed(self, tier: str, finish: pb.Finish, new_tokens: int, now: float) -> None:
        """Record how fast an answer was generated.

        new_tokens   tokens of this stream, which its timing covers; a resumed answer has others before them
        """
        timing = finish.timing
        if not timing.HasField("first_token"):
            return  # nothing was generated, or it was not measured
        self._paces[tier].record(
            now,
            first_seconds=timing.first_token.ToNanoseconds() / 1e9,
            decode_seconds=timing.decode.ToNanoseconds() / 1e9,
            timed_tokens=new_tokens,
            tokens=finish.usage.completion_tokens,
        )

    def holds_back(
        self, request: RoutingRequest, decision: Decision, now: float, deadline: Deadline = NEVER
    ) -> bool:
        """Whether the answer of the chosen tier is held back as a draft and checked."""
        return self.rules.hold_back(
            request,
            decision,
            lambda tier: self._paces[tier].answer_seconds(request.max_tokens, now),
            deadline.left(now),
        )

    def draws_sample(
        self, request: RoutingRequest, decision: Decision, now: float, deadline: Deadline = NEVER
    ) -> bool:
        """Whether a second answer is requested to compare a draft with.

        It is not if there is no time to wait for it, or if the tier has a queue, where others would wait.
        """
        seconds = self.rules.sample_seconds
        if not seconds or self._tiers[decision.tier].reported.load.queued:
            return False
        return self.holds_back(request, decision, now, deadline.earlier_by(seconds))

    def check_draft(
        self,
        prompt: str,
        text: str,
        *,
        finished: bool,
        logprobs: Sequence[float],
        quality_preference: float,
        samples: Sequence[str] = (),
    ) -> tuple[bool, Check]:
        """Return whether a draft is released, and the verdict."""
        check = self._checker.check(
            prompt, text, finished=finished, logprobs=logprobs or None, samples=samples
        )
        return self.rules.release(check, quality_preference), check

    def check_certainty(self, logprobs: Sequence[float], *, quality_preference: float) -> tuple[bool, Check]:
        """Return whether a draft that has its form is released, and the verdict on its log-probabilities."""
        check = self._checker.check_certainty(logprobs)
        return self.rules.release(check, quality_preference), check

    def _views(self, request: RoutingRequest, now: float) -> list[TierView]:
        """Return the tiers as the policy sees them."""
        views = []
        for tier, threshold in zip(self._tiers.tiers, self._thresholds.now(request.arm), strict=True):
            reported = tier.reported
            limit = reported.limits.queue_limit
            views.append(
                TierView(
                    tier.name,
                    threshold,
                    reported.healthy,
                    reported.model,
                    reported.unhealthy_reason,
                    saturated=0 < limit <= reported.load.queued,
                    answer_seconds=self._paces[tier.name].answer_seconds(request.max_tokens, now),
                    price=self.prices.get(tier.name),
                    models=tier.models,
                )
            )
        return views


def _as_error(no_route: NoRoute) -> errors.HeadraceError:
    """Return the exception that callers get: the same message and field, and a delay if it may pass."""
    cls = _ERRORS.get(type(no_route))
    if cls is None:
        return errors.NoWorkers(no_route.message, retry_after=NO_TIER_RETRY_SECONDS)
    return cls(no_route.message, field=no_route.field)
