"""Decide for live traffic: the policy, and what the router knows and remembers that it decides by.

That is the tiers' state, the thresholds in force, prices, how fast each tier answers, and the tier that each
conversation has reached. Time is an argument; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.router.optional import optional
from headrace.router.state.conversations import Sessions
from headrace.router.state.thresholds import Thresholds
from headrace.router.state.tier_pace import Pace
from headrace.router.state.tiers import Tiers
from headrace.routing.drafts.check import Check, DraftChecker
from headrace.routing.policy import Decision, Hints, Price, TierView, decide, shift
from headrace.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class CascadeRules:
    """When drafts are judged, and how.

    enabled      for requests that do not say
    from_score   prompts that score lower are so easy that their answers are streamed unjudged
    release      the lowest probability of being good enough that a draft is released with
    tokens       a draft that is longer is judged when it has so many
    sample_seconds   the longest that a draft waits for a second answer to be compared with; 0: none is drawn
    """

    enabled: bool = False
    from_score: float = 0.0
    release: float = 0.4
    tokens: int = 96
    sample_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request brings to the decision.

    scored      whether the score is the prompt's own; False where it could not be scored
    max_tokens  most tokens of its answer, if it says
    cascade     whether its draft may be judged; None: as the router is set
    resumes     it carries an answer on, which one model has begun
    """

    score: float
    hints: Hints
    tenant: str = ""
    session: str = ""
    max_tokens: int | None = None
    cascade: bool | None = None
    resumes: bool = False
    scored: bool = True

    @property
    def counts(self) -> bool:
        """Whether the score alone decides: the shares of the tiers are kept by such requests."""
        return self.hints.free and self.scored and not self.resumes


class Chooser:
    """Chooses tiers for requests, and learns from how they went."""

    def __init__(
        self,
        tiers: Tiers,
        thresholds: Thresholds,
        checker: DraftChecker,
        *,
        prices: Mapping[str, Price] | None = None,
        sessions: Sessions | None = None,
        rules: CascadeRules | None = None,
    ) -> None:
        self._tiers = tiers
        self._thresholds = thresholds
        self._checker = checker
        self._prices = dict(prices or {})
        self._sessions = Sessions() if sessions is None else sessions
        self._rules = CascadeRules() if rules is None else rules
        self._paces = {tier.name: Pace() for tier in tiers.tiers}

    @property
    def rules(self) -> CascadeRules:
        """When drafts are judged, and how."""
        return self._rules

    @property
    def prices(self) -> Mapping[str, Price]:
        """Of those tiers that have one."""
        return self._prices

    def views(self, max_tokens: int | None, now: float) -> list[TierView]:
        """The tiers as the policy sees them."""
        views = []
        for tier, threshold in zip(self._tiers.tiers, self._thresholds.now(), strict=True):
            seen = tier.seen
            limit = seen.limits.queue_limit
            views.append(
                TierView(
                    tier.name,
                    threshold,
                    seen.healthy,
                    seen.model,
                    seen.unhealthy_reason,
                    saturated=0 < limit <= seen.load.queued,
                    answer_seconds=self._paces[tier.name].answer_seconds(max_tokens, now),
                    price=self._prices.get(tier.name),
                    models=tier.models,
                )
            )
        return views

    def choose(
        self,
        asked: Asked,
        now: float,
        *,
        slack: float | None = None,
        failed: Sequence[str] = (),
        rejected: Sequence[str] = (),
    ) -> Decision:
        """The tier for a request. Raises what `policy.decide` raises.

        slack      seconds left for the answer; None: no deadline
        failed     tiers that could not serve it
        rejected   tiers whose drafts were given up, smallest first: a larger one than all of them is chosen
        """
        views = self.views(asked.max_tokens, now)
        floor = ""
        with optional("sessions"):
            floor = self._sessions.reached(asked.tenant, asked.session, now)
        below: list[str] = []  # the drafts that were given up came from among these
        if rejected:
            names = [view.name for view in views]
            below = names[: names.index(rejected[-1]) + 1]
        return decide(asked.score, asked.hints, views, floor=floor, slack=slack, exclude=[*below, *failed])

    def note(self, asked: Asked, decision: Decision) -> None:
        """Book the first decision about a request, if it counts."""
        if asked.counts:
            self._thresholds.note(asked.score, decision.wanted)

    def note_escalation(self, asked: Asked, before: str, after: str) -> None:
        """Book that a draft of the tier *before* was given up for *after*, if the request counts."""
        if asked.counts:
            places = [tier.name for tier in self._tiers.tiers]
            self._thresholds.escalated(places.index(before), places.index(after))

    def answered(self, asked: Asked, tier: str, now: float) -> None:
        """Book that a tier began to answer: its conversation stays there, or above."""
        names = [known.name for known in self._tiers.tiers]
        reached = self._sessions.reached(asked.tenant, asked.session, now)
        if reached and names.index(reached) > names.index(tier):
            tier = reached
        self._sessions.note(asked.tenant, asked.session, tier, now)

    def finished(self, tier: str, finish: pb.Finish, new_tokens: int, now: float) -> None:
        """Book how fast an answer came.

        new_tokens   that this stream brought, which its timing is about; an answer that resumed has others
        """
        timing = finish.timing
        if not timing.HasField("first_token"):
            return  # nothing was generated, or nobody measured it
        self._paces[tier].note(
            now,
            first_seconds=timing.first_token.ToNanoseconds() / 1e9,
            decode_seconds=timing.decode.ToNanoseconds() / 1e9,
            timed_tokens=new_tokens,
            tokens=finish.usage.completion_tokens,
        )

    def may_draft(self, asked: Asked) -> bool:
        """Whether answers to this request may be judged, as far as it can be told from itself."""
        wanted = self._rules.enabled if asked.cascade is None else asked.cascade
        hints = asked.hints
        # A preference for cost alone would release every draft.
        return wanted and not (asked.resumes or hints.tier or hints.model or hints.quality_preference == 0)

    def judges(self, asked: Asked, decision: Decision, now: float, slack: float | None) -> bool:
        """Whether the answer of the chosen tier is held back and judged.

        It is if a larger tier could take over and there would be time for both.
        """
        if not (self.may_draft(asked) and decision.escalations and asked.score >= self._rules.from_score):
            return False
        views = {view.name: view for view in self.views(asked.max_tokens, now)}
        both = views[decision.tier].answer_seconds + views[decision.escalations[0]].answer_seconds
        return slack is None or both <= slack

    def samples(self, asked: Asked, decision: Decision, now: float, slack: float | None) -> bool:
        """Whether a second answer is drawn beside a draft that is judged.

        Not where there is no time to wait for it, and not where it would make others wait: at a queue.
        """
        seconds = self._rules.sample_seconds
        if not seconds or self._tiers[decision.tier].seen.load.queued:
            return False
        return self.judges(asked, decision, now, None if slack is None else slack - seconds)

    def check(
        self,
        prompt: str,
        text: str,
        *,
        finished: bool,
        logprobs: Sequence[float],
        preference: float,
        samples: Sequence[str] = (),
    ) -> tuple[bool, Check]:
        """Whether a draft is released, and the verdict.

        A preference for quality lowers its chances as it would raise the score of the prompt.
        """
        check = self._checker.check(
            prompt, text, finished=finished, logprobs=logprobs or None, samples=samples
        )
        return shift(check.good, 1 - preference) >= self._rules.release, check
