"""What the routing decisions read of a request: its score and the caller's hints. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.quoting import quoted
from headrace.routing.no_route import ConflictingHints, NoSuchModel, NoSuchTier, NoTierAvailable
from headrace.routing.scoring.conversation import CONTINUES, Carried
from headrace.routing.success.estimate import Estimate
from headrace.routing.tier_view import TierView


@dataclass(frozen=True, slots=True)
class Hints:
    """The caller's routing hints; the defaults mean no preference. See headrace.v1.Routing."""

    tier: str = ""
    model: str = ""
    min_tier: str = ""
    max_tier: str = ""
    quality_preference: float = 0.5
    allow_escalation: bool = True

    @property
    def free(self) -> bool:
        """Whether the score alone decides: no pin and no bound."""
        return not (self.tier or self.model or self.min_tier or self.max_tier)


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What the decisions about one request read of it.

    scored      False if the prompt could not be scored, so that *score* is a default
    max_tokens  the most tokens that its answer may have; None if it does not say
    cascade     whether its answer may be held back and checked; None: as the router is configured
    resumes     it continues an answer that one model has begun
    continues   how much it depends on earlier turns, 0 to 1; see `Score`
    carried     what its conversation remembers of it; None: nothing changes
    estimates   by tier; empty unless the scorer was fitted to outcomes of tiers
    prompt_bytes   size of the prompt; 0 unless there are estimates
    arm         the scorer that scored it: empty for the one in use, "canary" for a candidate
    """

    score: float
    hints: Hints
    tenant: str = ""
    session: str = ""
    max_tokens: int | None = None
    cascade: bool | None = None
    resumes: bool = False
    scored: bool = True
    continues: float = 0.0
    carried: Carried | None = None
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    arm: str = ""
    prompt_bytes: int = 0

    @property
    def keeps_tier(self) -> bool:
        """Whether its conversation must not return to a smaller tier with it.

        A change of topic may. If the request could not be scored, it is not known whether it is one.
        """
        return not self.scored or self.continues >= CONTINUES

    @property
    def counts(self) -> bool:
        """Whether the score alone decides. Only such requests count towards the tiers' shares."""
        return self.hints.free and self.scored and not self.resumes


def allowed_places(hints: Hints, tiers: Sequence[TierView]) -> tuple[list[int], str]:
    """Return the places of the tiers that the hints allow, ascending, and the name of the deciding hint.

    Raises NoSuchTier, NoSuchModel or ConflictingHints, and NoTierAvailable while it is not known whether an
    allowed tier serves the model.
    """
    if hints.free:
        return list(range(len(tiers))), ""
    allowed = _bounded(hints, tiers)
    deciding = "the bounds" if hints.min_tier or hints.max_tier else ""
    if hints.tier:
        pinned = [tier.name for tier in tiers].index(hints.tier)
        if pinned not in allowed:
            raise ConflictingHints(
                f"routing.tier {hints.tier!r} is outside of min_tier and max_tier", "routing.tier"
            )
        allowed, deciding = [pinned], "the tier pin"
    if hints.model:
        allowed, deciding = _serving(hints.model, allowed, tiers), "the model pin"
    return allowed, deciding


def _bounded(hints: Hints, tiers: Sequence[TierView]) -> list[int]:
    """Return the places from min_tier to max_tier."""
    places = {tier.name: place for place, tier in enumerate(tiers)}
    for hint in ("tier", "min_tier", "max_tier"):
        name = getattr(hints, hint)
        if name and name not in places:
            raise NoSuchTier(
                f"routing.{hint} is {quoted(name)}; the tiers are {', '.join(places)}", f"routing.{hint}"
            )
    low = places[hints.min_tier] if hints.min_tier else 0
    high = places[hints.max_tier] if hints.max_tier else len(tiers) - 1
    if low > high:
        raise ConflictingHints(
            f"routing.min_tier {hints.min_tier!r} is above routing.max_tier {hints.max_tier!r}",
            "routing.min_tier",
        )
    return list(range(low, high + 1))


def _serving(model: str, places: Sequence[int], tiers: Sequence[TierView]) -> list[int]:
    """Return those of *places* whose tier serves *model*."""
    serving = [place for place in places if tiers[place].serves(model)]
    if serving:
        return serving
    unknown = [tiers[place].name for place in places if not tiers[place].model]
    if unknown:
        # An answer that resumes after a restart names its model, perhaps before its tier was polled.
        raise NoTierAvailable(
            f"routing.model is {quoted(model)}, and the model of {', '.join(unknown)} is not known yet; "
            "try again shortly"
        )
    if any(tier.serves(model) for tier in tiers):
        raise ConflictingHints(
            f"routing.model {model!r} is served by none of the tiers that the other hints allow",
            "routing.model",
        )
    known = ", ".join(sorted({each for tier in tiers for each in tier.models or {tier.model} if each}))
    raise NoSuchModel(f"routing.model is {quoted(model)}; the models are {known}", "routing.model")
