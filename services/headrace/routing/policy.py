"""Choose a tier from the score, the caller's hints, the tiers' state and the time left. Pure functions.

Tiers are ordered from small to large. Each has a threshold, the lowest score that it is meant for, and the
largest tier whose threshold the score reaches is wanted. A conversation does not return to a smaller tier
than it has reached. Hints bound the choice. A tier that is not healthy, too slow for the deadline or full is
replaced by a larger one, and by a smaller one only if there is no larger one. A larger tier that costs less
than the wanted one is used in its place. In any state of the tiers, a higher score never leads to a smaller
tier.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from headrace.routing.no_route import NoTierAvailable
from headrace.routing.request import Hints, allowed_places
from headrace.routing.score import sigmoid
from headrace.routing.tier_view import TierView


@dataclass(frozen=True, slots=True)
class Candidate:
    """One tier, and the reason for or against it."""

    tier: TierView
    eligible: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The tier of a request, and the reason in one sentence.

    wanted       place of the tier that the score asks for, before hints and the tiers' state
    place        place of the chosen tier
    escalations  names of the larger tiers that may replace it, nearest first
    """

    tier: str
    why: str
    candidates: tuple[Candidate, ...]
    wanted: int
    place: int
    escalations: tuple[str, ...]


def shift(score: float, preference: float) -> float:
    """Shift the score by a quality preference: their log-odds are added.

    A preference of 0.5 changes nothing, 0 (cost alone) gives 0, and 1 (quality alone) gives 1. For other
    preferences, a score of 0 or 1 is certain and stays.
    """
    if preference in (0, 1):
        return preference
    if score in (0, 1):
        return score
    return sigmoid(_log_odds(score) + _log_odds(preference))


def decide(
    score: float,
    hints: Hints,
    tiers: Sequence[TierView],
    *,
    floor: str = "",
    seconds_left: float = math.inf,
    exclude: Collection[str] = (),
) -> Decision:
    """Choose the tier for a prompt of *score*, 0 to 1.

    tiers         at least one, smallest first, thresholds ascending
    floor         the tier that the conversation has reached; empty: none
    seconds_left  until the deadline; infinite without one
    exclude       tiers that have failed for this request

    Raises NoSuchTier, NoSuchModel or ConflictingHints for hints that no tier can meet, and NoTierAvailable
    if none of the allowed tiers is healthy.
    """
    allowed, deciding = allowed_places(hints, tiers)
    shifted = shift(score, hints.quality_preference)
    wanted = _wanted(shifted, hints.quality_preference, tiers)
    reached = max(wanted, _place(floor, tiers))
    ideal = _at_or_above(reached, allowed)
    # Without escalation there is no second choice.
    choices = allowed if hints.allow_escalation else [ideal]
    serving = [place for place in choices if tiers[place].healthy and tiers[place].name not in exclude]
    if not serving:
        raise _none_available(choices, tiers)
    # First those that will be in time; of those, the ones whose queue is not full.
    best = min(_trouble(tiers[place], seconds_left) for place in serving)
    fit = [place for place in serving if _trouble(tiers[place], seconds_left) == best]
    chosen = _cheapest_from(_at_or_above(ideal, fit), fit, tiers)
    steps = [wanted, reached, ideal, chosen]
    return Decision(
        tier=tiers[chosen].name,
        why=_why(score, shifted, steps, deciding, tiers, seconds_left=seconds_left, exclude=exclude),
        candidates=tuple(
            Candidate(tier, *_verdict(place, chosen, tiers, allowed, choices, exclude, seconds_left))
            for place, tier in enumerate(tiers)
        ),
        wanted=wanted,
        place=chosen,
        escalations=tuple(tiers[place].name for place in serving if place > chosen),
    )


def _wanted(score: float, preference: float, tiers: Sequence[TierView]) -> int:
    # The two extreme preferences decide alone, whatever the thresholds are.
    if preference in (0, 1):
        return 0 if preference == 0 else len(tiers) - 1
    return max(place for place, tier in enumerate(tiers) if not place or score >= tier.threshold)


def _at_or_above(place: int, places: Sequence[int]) -> int:
    """Return the nearest of *places* from *place* upwards, or the highest below if there is none above."""
    return min((other for other in places if other >= place), default=places[-1])


def _cheapest_from(place: int, places: Sequence[int], tiers: Sequence[TierView]) -> int:
    """Return the cheapest of *places* from *place* upwards: nobody pays more for a smaller model.

    Prompt and completion prices count alike. Tiers without a price are not compared.
    """
    price = tiers[place].price
    if price is None:
        return place
    priced = [
        (other_price.prompt + other_price.completion, other)
        for other in places
        if other >= place and (other_price := tiers[other].price) is not None
    ]
    return min(priced)[1]


def _trouble(tier: TierView, seconds_left: float) -> tuple[bool, bool]:
    return tier.answer_seconds > seconds_left, tier.saturated


def _place(name: str, tiers: Sequence[TierView]) -> int:
    return next((place for place, tier in enumerate(tiers) if tier.name == name), 0)


def _none_available(choices: Sequence[int], tiers: Sequence[TierView]) -> NoTierAvailable:
    names = ", ".join(tiers[place].name for place in choices)
    problems = "; ".join(
        f"{tiers[place].name}: {tiers[place].unhealthy_reason or 'failed this request'}" for place in choices
    )
    return NoTierAvailable(
        f"no tier that the request allows ({names}) can serve it now ({problems}); try again shortly"
    )


def _verdict(
    place: int,
    chosen: int,
    tiers: Sequence[TierView],
    allowed: Sequence[int],
    choices: Sequence[int],
    exclude: Collection[str],
    seconds_left: float,
) -> tuple[bool, str]:
    """Return whether the tier could have been chosen, and why it was or was not."""
    tier = tiers[place]
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
    if _trouble(tier, seconds_left) > _trouble(tiers[chosen], seconds_left):
        return True, _problem(tier, seconds_left)
    if place > chosen:
        return True, "larger than needed"
    price, other = tier.price, tiers[chosen].price
    if price and other and price.prompt + price.completion > other.prompt + other.completion:
        return True, "smaller than the chosen tier, and more expensive"
    return True, f"too small for the score: its threshold is {tier.threshold:.2f}"


def _problem(tier: TierView, seconds_left: float, exclude: Collection[str] = ()) -> str:
    """Return why a tier was not chosen although the request was meant for it."""
    if not tier.healthy:
        return f"cannot serve ({tier.unhealthy_reason or 'not healthy'})"
    if tier.name in exclude:
        return "failed this request"
    if tier.answer_seconds > seconds_left:
        return f"would take {tier.answer_seconds:.1f} s of the {seconds_left:.1f} s left"
    return "has a full queue" if tier.saturated else "is more expensive"


def _why(
    score: float,
    shifted: float,
    steps: Sequence[int],
    deciding: str,
    tiers: Sequence[TierView],
    *,
    seconds_left: float,
    exclude: Collection[str],
) -> str:
    wanted, reached, ideal, chosen = steps
    preference = "" if math.isclose(score, shifted) else f", {shifted:.2f} after the quality preference,"
    why = f"score {score:.2f}{preference} is in the range of tier {tiers[wanted].name!r}"
    if reached != wanted:
        why += f"; its conversation has reached {tiers[reached].name!r}"
    if ideal != reached:
        why += f"; {deciding} moved it to {tiers[ideal].name!r}"
    if chosen != ideal:
        why += f"; {tiers[ideal].name!r} {_problem(tiers[ideal], seconds_left, exclude)}, "
        why += f"so it goes to {tiers[chosen].name!r}"
    return why


def _log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))
