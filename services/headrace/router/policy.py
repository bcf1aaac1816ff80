"""Choose a tier: from the score, the caller's hints and the tiers' health. Pure functions.

Tiers are ordered from small to large and each has the lowest score that it is meant for; the largest
whose threshold the score reaches is wanted. Hints bound the choice, health may move it: up first, for
the answer gets no worse, then down.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from headrace import errors
from headrace.router.complexity import sigmoid


@dataclass(frozen=True, slots=True)
class TierView:
    """A tier as the policy sees it.

    threshold   the lowest score that it is meant for; the first tier's is 0
    model       what it serves; empty while unknown
    """

    name: str
    threshold: float
    healthy: bool = True
    model: str = ""
    unhealthy_reason: str = ""


@dataclass(frozen=True, slots=True)
class Hints:
    """What the caller wishes; empty strings and the defaults wish nothing. See headrace.v1.Routing."""

    tier: str = ""
    model: str = ""
    min_tier: str = ""
    max_tier: str = ""
    quality_preference: float = 0.5
    allow_escalation: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """One tier, and what spoke for or against it."""

    tier: TierView
    eligible: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and why, in one sentence."""

    tier: str
    why: str
    candidates: tuple[Candidate, ...]


def thresholds(count: int) -> list[float]:
    """Evenly spaced thresholds for *count* tiers: 0, 1/count, 2/count..."""
    return [place / count for place in range(count)]


def shift(score: float, preference: float) -> float:
    """The score as seen with a quality preference: their log-odds added.

    At 0.5 the score stays as it is; a preference of 0 (cost alone) makes it 0, one of 1 (quality alone) 1,
    and for the rest a score of 0 or 1 is certain and stays.
    """
    if preference in (0, 1):
        return preference
    if score in (0, 1):
        return score
    return sigmoid(_log_odds(score) + _log_odds(preference))


def decide(
    score: float, hints: Hints, tiers: Sequence[TierView], *, exclude: Collection[str] = ()
) -> Decision:
    """Choose the tier for a prompt of *score*, 0 to 1.

    tiers     at least one, smallest first, thresholds ascending
    exclude   tiers that were tried and failed this request

    Raises UnknownTier, UnknownModel or HintsConflict for hints that no tier can meet, and NoWorkers when
    the tiers that they allow are not healthy.
    """
    allowed, wish = _allowed(hints, tiers)
    shifted = shift(score, hints.quality_preference)
    wanted = max(place for place, tier in enumerate(tiers) if place == 0 or shifted >= tier.threshold)
    ideal = min(max(wanted, allowed[0]), allowed[-1])
    if ideal not in allowed:  # a model pin may leave gaps
        ideal = min(allowed, key=lambda place: (abs(place - ideal), -place))
    # Up first, nearest first; then down. Without escalation there is no second choice.
    choices = [place for place in allowed if place >= ideal]
    choices += [place for place in reversed(allowed) if place < ideal]
    if not hints.allow_escalation:
        choices = [ideal]
    chosen = next(
        (place for place in choices if tiers[place].healthy and tiers[place].name not in exclude), None
    )
    if chosen is None:
        names = ", ".join(tiers[place].name for place in choices)
        problems = "; ".join(
            f"{tiers[place].name}: {tiers[place].unhealthy_reason or 'failed this request'}"
            for place in choices
        )
        raise errors.NoWorkers(
            f"no tier that the request allows ({names}) can serve it now ({problems}); try again shortly",
            retry_after=1.0,
        )
    candidates = tuple(
        Candidate(tier, *_judge(place, chosen, tier, allowed, choices, exclude))
        for place, tier in enumerate(tiers)
    )
    return Decision(tiers[chosen].name, _why(score, shifted, wanted, ideal, chosen, wish, tiers), candidates)


def _allowed(hints: Hints, tiers: Sequence[TierView]) -> tuple[list[int], str]:
    """The places of the tiers that the hints allow, ascending, and which hint decides, for the why."""
    places = {tier.name: place for place, tier in enumerate(tiers)}
    for field in ("tier", "min_tier", "max_tier"):
        name = getattr(hints, field)
        if name and name not in places:
            raise errors.UnknownTier(
                f"routing.{field} is {name!r}; the tiers are {', '.join(places)}", field=f"routing.{field}"
            )
    low = places[hints.min_tier] if hints.min_tier else 0
    high = places[hints.max_tier] if hints.max_tier else len(tiers) - 1
    if low > high:
        raise errors.HintsConflict(
            f"routing.min_tier {hints.min_tier!r} is above routing.max_tier {hints.max_tier!r}",
            field="routing.min_tier",
        )
    allowed = list(range(low, high + 1))
    wish = "the bounds" if hints.min_tier or hints.max_tier else ""
    if hints.tier:
        if places[hints.tier] not in allowed:
            raise errors.HintsConflict(
                f"routing.tier {hints.tier!r} is outside of min_tier and max_tier", field="routing.tier"
            )
        allowed, wish = [places[hints.tier]], "the tier pin"
    if hints.model:
        if hints.model not in {tier.model for tier in tiers}:
            known = ", ".join(sorted(tier.model for tier in tiers if tier.model)) or "not known yet"
            raise errors.UnknownModel(
                f"routing.model is {hints.model!r}; the models are {known}", field="routing.model"
            )
        allowed = [place for place in allowed if tiers[place].model == hints.model]
        if not allowed:
            raise errors.HintsConflict(
                f"routing.model {hints.model!r} is served by none of the tiers that the other hints allow",
                field="routing.model",
            )
        wish = "the model pin"
    return allowed, wish


def _judge(
    place: int,
    chosen: int,
    tier: TierView,
    allowed: Sequence[int],
    choices: Sequence[int],
    exclude: Collection[str],
) -> tuple[bool, str]:
    """Whether the tier could have been chosen, and why it was or was not."""
    if place not in allowed:
        return False, "the hints exclude it"
    if not tier.healthy:
        return False, f"not healthy: {tier.unhealthy_reason or 'unknown'}"
    if tier.name in exclude:
        return False, "failed this request"
    if place not in choices:
        return False, "the hints allow no move to another tier"
    if place == chosen:
        return True, "chosen"
    if place > chosen:
        return True, "larger than needed"
    return True, f"too small for the score, meant for {tier.threshold:.2f} and up to the next"


def _why(
    score: float,
    shifted: float,
    wanted: int,
    ideal: int,
    chosen: int,
    wish: str,
    tiers: Sequence[TierView],
) -> str:
    preference = "" if math.isclose(score, shifted) else f", {shifted:.2f} after the quality preference,"
    why = f"score {score:.2f}{preference} is in the range of tier {tiers[wanted].name!r}"
    if ideal != wanted:
        why += f"; {wish} moved it to {tiers[ideal].name!r}"
    if chosen != ideal:
        reason = tiers[ideal].unhealthy_reason or "it failed this request"
        why += f"; {tiers[ideal].name!r} cannot serve ({reason}), so {tiers[chosen].name!r} does"
    return why


def _log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))
