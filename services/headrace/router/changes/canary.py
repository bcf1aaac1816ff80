"""Serve a share of requests by a candidate scorer, and roll it back if it is worse than the one in use.

The arm of a request follows from its tenant and conversation, so a conversation keeps its arm; a request
without either is assigned by chance. `routing.changes.verdict` compares the arms, with one outcome per
conversation, or per request without one. All processes of a router add up their evidence, and a roll-back by
one is a roll-back by all. A candidate that was rolled back stays so until its files change or the router is
restarted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from dataclasses import dataclass, field

from headrace.metrics import changes
from headrace.router.changes.answered import Answered, Rating
from headrace.router.optional import optional
from headrace.router.siblings import Siblings
from headrace.router.state.tenant_memory import TenantMemory
from headrace.router.state.thresholds import CONTROL
from headrace.routing.changes.verdict import Evidence, Rule, Verdict, judge
from headrace.routing.request import RoutingRequest
from headrace.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)

CANARY = "canary"  # the arm of the candidate, as in `RoutingRequest.arm`
NAMES = {CONTROL: "control", CANARY: CANARY}  # of the arms, in metrics and for people
REMEMBERED = 20_000  # conversations and requests whose ratings find their arm
# Together, a candidate that is not worse is rolled back with a probability of at most 5 %.
RULES = {
    "quality": Rule(0.02, 20),
    "judged": Rule(0.01, 20),
    "errors": Rule(0.01, 30),
    "cost": Rule(0.01, 30),
}
_TYPICAL = {"quality": 0.25, "judged": 0.5, "errors": 0.02, "cost": 0.2}
_BAD = frozenset({"failed", "deadline", "refused"})  # outcomes that a scorer could have caused
_SCALE_FROM = 20  # answers of control from which costs are compared
_SCALE = 5.0  # mean costs of control that are the worst outcome
_TOPIC, _ROLLED_BACK = "canary", "canary.rolled_back"


@dataclass(slots=True)
class Arm:
    """What requests of one arm resulted in; all requests, not one per conversation.

    cost   None without prices
    """

    requests: int = 0
    failed: int = 0
    cost: float | None = None

    def add(self, other: Arm) -> None:
        """Add the counts of *other*."""
        self.requests += other.requests
        self.failed += other.failed
        if other.cost is not None:
            self.cost = (self.cost or 0.0) + other.cost


@dataclass(slots=True)
class Trial:
    """What one process has seen of a candidate.

    candidate   identifies the candidate and the scorer in use, which outcomes depend on
    """

    candidate: str
    evidence: dict[str, Evidence]
    arms: dict[str, Arm] = field(default_factory=lambda: {CONTROL: Arm(), CANARY: Arm()})


@dataclass(frozen=True, slots=True)
class State:
    """The state of a canary, of all processes together.

    rolled_back   the measure in which the candidate was worse; empty while it is served
    """

    share: float
    rolled_back: str
    arms: dict[str, Arm]
    verdicts: dict[str, Verdict]


@dataclass(slots=True)
class _Unit:
    """A conversation or a request, which is one outcome of its arm in each measure."""

    arm: str
    ended: bool = False
    rated: bool = False
    judged: bool = False


class Canary:
    """Assigns requests to arms and judges the candidate. It is a `Watcher`.

    share        of conversations that the candidate scores, above 0 and below 1
    cost_limit   largest mean cost of the candidate's requests, as a multiple of the others'; 0: not compared
    """

    def __init__(self, share: float, siblings: Siblings, *, cost_limit: float = 0.0) -> None:
        self._share = share
        self._cost_limit = cost_limit
        self._siblings = siblings
        self._rolled_back: dict[str, str] = {}  # measure, by candidate; that of the last one
        self._others: dict[int, Trial] = {}
        self.restart("", "")
        siblings.on_tell(_TOPIC, self._receive)
        siblings.on_tell(_ROLLED_BACK, self._roll_back_too)

    def restart(self, candidate: str, control: str) -> None:
        """Start with a new candidate, or compare it with another scorer in use.

        candidate, control   identities of the two
        """
        if candidate not in self._rolled_back:
            self._rolled_back = {}
        self._candidate = candidate
        self._salt = candidate.encode()
        self._since = time.monotonic()
        self._others = {}
        self._units: TenantMemory[_Unit] = TenantMemory(REMEMBERED)
        self._names: TenantMemory[str] = TenantMemory(REMEMBERED)  # of units, by answer
        self._trial = Trial(
            f"{candidate} {control}",
            {name: Evidence(self._share, typical) for name, typical in _TYPICAL.items()},
        )
        self._set_gauge()

    @property
    def rolled_back(self) -> str:
        """The measure in which the candidate was worse; empty while it is served."""
        return self._rolled_back.get(self._candidate, "")

    def arm_of(self, tenant: str, session: str, request_id: str = "") -> str:
        """Return the arm of a request."""
        if self.rolled_back:
            return CONTROL
        if not (name := session or request_id):
            return CANARY if random.random() < self._share else CONTROL
        digest = hashlib.blake2b(f"{tenant}\0{name}".encode(), key=self._salt[:64], digest_size=8).digest()
        return CANARY if int.from_bytes(digest) < self._share * 2**64 else CONTROL

    # As a watcher.

    def wants_text(self, request: pb.GenerateRequest, facts: RoutingRequest) -> bool:
        """See `Watcher`. It needs no text."""
        return False

    def answered(self, answered: Answered) -> None:
        """Add the result of a request to its arm. Requests that the score did not decide are ignored."""
        facts = answered.facts
        began = time.monotonic() - answered.seconds
        if self.rolled_back or began < self._since or not facts.hints.free or facts.resumes:
            return
        failed = answered.outcome in _BAD or not facts.scored
        cost = answered.bill.cost
        own = Arm(1, int(failed), cost)
        self._trial.arms[facts.arm].add(own)
        changes.CANARY_REQUESTS.of(arm=NAMES[facts.arm], outcome=answered.outcome).add()
        if cost is not None:
            changes.CANARY_COST.of(arm=NAMES[facts.arm]).add(cost)
        name = facts.session or answered.request.request_id
        self._names.put(facts.tenant, answered.answer_id, name)
        if (unit := self._units.get(facts.tenant, name)) is None:
            unit = _Unit(facts.arm)
            self._units.put(facts.tenant, name, unit)
        if not unit.ended and (failed or answered.outcome == "ok"):
            unit.ended = True
            self._add("errors", facts.tenant, unit, float(failed))
            if cost is not None and answered.outcome == "ok" and self._cost_limit:
                self._add_cost(facts.tenant, unit, cost)

    def rated(self, rating: Rating) -> None:
        """Add the rating of an answer to the arm of its request."""
        name = self._names.get(rating.tenant, rating.answer_id)
        unit = None if name is None else self._units.get(rating.tenant, name)
        # A judge's outcomes are relative, and of some tiers' answers only. Among callers' ratings, they would
        # count against an arm of which more answers are judged.
        judged = rating.source == "judge"
        if unit is None or self.rolled_back or (unit.judged if judged else unit.rated):
            return
        if judged:
            unit.judged = True
        else:
            unit.rated = True
        self._add("judged" if judged else "quality", rating.tenant, unit, 1 - rating.quality)
        verdict = "good" if rating.quality >= 0.5 else "not_good"
        changes.CANARY_RATINGS.of(arm=NAMES[unit.arm], verdict=verdict).add()

    def _add(self, measure: str, tenant: str, unit: _Unit, badness: float) -> None:
        # Names are long: the evidence about all tenants must fit one message to the siblings.
        short = hashlib.blake2b(tenant.encode(), digest_size=8).hexdigest() if tenant else ""
        self._trial.evidence[measure].add(short, candidate=unit.arm == CANARY, badness=badness)

    def _add_cost(self, tenant: str, unit: _Unit, cost: float) -> None:
        control = self._trial.arms[CONTROL]
        if control.requests < _SCALE_FROM or not control.cost:
            return
        allowed = cost / self._cost_limit if unit.arm == CANARY else cost
        scale = _SCALE * control.cost / control.requests
        self._add("cost", tenant, unit, min(allowed / scale, 1.0))

    # All processes together.

    async def watch(self, poll_seconds: float) -> None:
        """Exchange evidence with the siblings and judge the candidate until cancelled."""
        while True:
            await asyncio.sleep(poll_seconds)
            with optional("canary"):
                self.exchange()

    def exchange(self) -> None:
        """Send the evidence of this process to the siblings, and roll the candidate back if it is worse."""
        if measure := self.rolled_back:
            self._siblings.tell(_ROLLED_BACK, self._candidate, measure)
            return
        self._siblings.tell(_TOPIC, self._siblings.number, self._trial)
        for measure, verdict in self._verdicts().items():
            if verdict.worse:
                self._roll_back(measure)
                changes.CANARY_ROLLBACKS.of(measure=measure).add()
                log.error(
                    "canary rolled back",
                    extra={
                        "measure": measure,
                        # From 0 (good) to 1 (bad); costs relative to the largest that is compared.
                        "badness": verdict.means,
                        "outcomes": verdict.counts,
                        "p_value": verdict.p_value,
                    },
                )
                self._siblings.tell(_ROLLED_BACK, self._candidate, measure)
                return

    def state(self) -> State:
        """Return the state, with the evidence of the siblings as of their last message."""
        arms = {CONTROL: Arm(), CANARY: Arm()}
        for trial in self._trials():
            for name, arm in trial.arms.items():
                arms[name].add(arm)
        share = 0.0 if self.rolled_back else self._share
        return State(share, self.rolled_back, arms, self._verdicts())

    def _receive(self, number: int, trial: Trial) -> None:
        self._others[number] = trial

    def _roll_back_too(self, candidate: str, measure: str) -> None:
        if candidate == self._candidate and not self.rolled_back:
            self._roll_back(measure)
            log.error("canary rolled back by another process of the router", extra={"measure": measure})

    def _roll_back(self, measure: str) -> None:
        self._rolled_back = {self._candidate: measure}
        self._set_gauge()

    def _verdicts(self) -> dict[str, Verdict]:
        trials = self._trials()
        return {name: judge([trial.evidence[name] for trial in trials], rule) for name, rule in RULES.items()}

    def _trials(self) -> list[Trial]:
        mine = self._trial
        return [mine, *(other for other in self._others.values() if other.candidate == mine.candidate)]

    def _set_gauge(self) -> None:
        changes.CANARY_SHARE.of().set(0.0 if self.rolled_back else self._share)
