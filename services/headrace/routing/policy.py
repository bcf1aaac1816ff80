"""Choose a tier from the score, the caller's hints, the tiers' state and the time left. Pure functions.

Tiers are ordered from small to large. Each has a threshold, the lowest score that it is meant for, and the
largest tier whose threshold the score reaches is wanted. A turn that continues its conversation does not
return to a smaller tier than the conversation has reached. Hints bound the choice. A tier that is not
healthy, too slow for the deadline or full is replaced by a larger one, and by a smaller one only if there is
no larger one. A larger tier that costs less than the wanted one is used in its place. In any state of the
tiers, a higher score never leads to a smaller tier.

With estimates of each tier's quality and cost (`success/choosing.py`), the best tier by these is wanted
instead, and tiers need not be ordered: the next best replaces one that cannot serve, and a conversation does
not return to a tier that is less likely to answer well. Hints bound the choice in the configured order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from headrace.routing.no_route import NoTierAvailable
from headrace.routing.request import Hints, allowed_places
from headrace.routing.scoring.conversation import CONTINUES
from headrace.routing.scoring.score import sigmoid
from headrace.routing.success.choosing import Weighed
from headrace.routing.tier_view import TierView


@dataclass(frozen=True, slots=True)
class Candidate:
    """One tier, and the reason for or against it."""

    tier: TierView
    eligible: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Considered:
    """What a decision was made from, which explains it.

    shifted   the score after the quality preference
    floor     place of the tier that the conversation has reached; 0 without one
    wanted, reached, ideal, chosen   places of the tier for the score, after the conversation, after the
              hints, and after the tiers' state
    deciding  name of the hint that decided
    continues how much the request depends on earlier turns of its conversation, 0 to 1
    allowed   places that the hints allow
    choices   places of which one could be chosen
    weighed   the tiers' expected quality and cost, by which the tier was chosen; None: by score
    """

    score: float
    shifted: float
    tiers: Sequence[TierView]
    floor: int
    wanted: int
    reached: int
    ideal: int
    chosen: int
    deciding: str
    allowed: Sequence[int]
    choices: Sequence[int]
    exclude: Collection[str]
    seconds_left: float
    continues: float
    weighed: Weighed | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The tier of a request.

    wanted       place of the tier for the score or the estimates, before hints and the tiers' state
    place        place of the tier
    escalations  names of the larger tiers that may replace it, nearest first; by estimates, of those that
                 are more likely to answer well, best first
    propensity   probability with which this tier was chosen, 0 to 1: below 1 if chance decided
    chances      probability of each place that chance could choose; empty if chance had no part
    considered   for `why` and `candidates`, which are made when they are read: few decisions are explained
    """

    tier: str
    wanted: int
    place: int
    escalations: tuple[str, ...]
    considered: Considered
    propensity: float = 1.0
    chances: tuple[tuple[int, float], ...] = ()

    @property
    def explored(self) -> bool:
        """Whether chance chose another tier than the policy."""
        return self.place != self.considered.chosen

    @property
    def why(self) -> str:
        """The reason in one sentence."""
        why = _why(self.considered)
        return f"{why}; --explore sent it to {self.tier!r}" if self.explored else why

    @property
    def cause(self) -> str:
        """What decided: "score", "success" (the estimates), "conversation", "hint", "explored" (chance), or
        what kept the tier from serving it: "health", "load" or "price".
        """
        return "explored" if self.explored else _cause(self.considered)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every tier, and the reason for or against it."""
        tiers = enumerate(self.considered.tiers)
        return tuple(Candidate(tier, *_verdict(place, tier, self.considered)) for place, tier in tiers)


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
    continues: float = 0.0,
    weighed: Weighed | None = None,
) -> Decision:
    """Choose the tier for a prompt of *score*, 0 to 1.

    tiers         at least one, smallest first, thresholds ascending
    floor         the tier that the conversation has reached; empty: none
    seconds_left  until the deadline; infinite without one
    exclude       tiers that have failed for this request
    continues     how much the request depends on earlier turns, 0 to 1; explains the score
    weighed       what the answer of each tier is expected to be: it decides in place of the score

    Raises NoSuchTier, NoSuchModel or ConflictingHints for hints that no tier can meet, and NoTierAvailable
    if none of the allowed tiers is healthy.
    """
    allowed, deciding = allowed_places(hints, tiers)
    shifted = shift(score, hints.quality_preference)
    lowest = _place(floor, tiers)
    if weighed is None:
        wanted = _wanted(shifted, hints.quality_preference, tiers)
        reached = max(wanted, lowest)
        ideal = _at_or_above(reached, allowed)
    else:
        wanted = weighed.best(range(len(tiers)))
        if floor:
            weighed = weighed.after(lowest)
        reached = weighed.best(weighed.not_below(range(len(tiers))))
        ideal = weighed.best(weighed.not_below(allowed))
    # Without escalation there is no second choice.
    choices = allowed if hints.allow_escalation else [ideal]
    serving = [place for place in choices if tiers[place].healthy and tiers[place].name not in exclude]
    if not serving:
        raise _none_available(choices, tiers)
    # First those that will be in time; of those, the ones whose queue is not full.
    troubles = [trouble(tiers[place], seconds_left) for place in serving]
    best = min(troubles)
    fit = [place for place, found in zip(serving, troubles, strict=True) if found == best]
    if weighed is None:
        chosen = cheapest_from(_at_or_above(ideal, fit), fit, tiers)
    else:
        chosen = weighed.best(weighed.not_below(fit))
    return Decision(
        tier=tiers[chosen].name,
        wanted=wanted,
        place=chosen,
        escalations=escalations(chosen, serving, tiers, weighed),
        considered=Considered(
            score=score,
            shifted=shifted,
            tiers=tiers,
            floor=lowest,
            wanted=wanted,
            reached=reached,
            ideal=ideal,
            chosen=chosen,
            deciding=deciding,
            allowed=allowed,
            choices=choices,
            exclude=exclude,
            seconds_left=seconds_left,
            continues=continues,
            weighed=weighed,
        ),
    )


def escalations(
    place: int, serving: Sequence[int], tiers: Sequence[TierView], weighed: Weighed | None
) -> tuple[str, ...]:
    """Return the names of those of *serving* that may replace the tier at *place*; see `Decision`."""
    if weighed is None:
        return tuple(tiers[other].name for other in serving if other > place)
    return tuple(tiers[other].name for other in weighed.better_than(place, serving))


def _wanted(score: float, preference: float, tiers: Sequence[TierView]) -> int:
    # The two extreme preferences decide alone, whatever the thresholds are.
    if preference in (0, 1):
        return 0 if preference == 0 else len(tiers) - 1
    return place_for(score, [tier.threshold for tier in tiers])


def place_for(score: float, thresholds: Sequence[float]) -> int:
    """Return the place of the largest tier whose threshold the score reaches; the first if there is none."""
    return max(place for place, lowest in enumerate(thresholds) if not place or score >= lowest)


def _at_or_above(place: int, places: Sequence[int]) -> int:
    """Return the nearest of *places*, ascending, from *place* upwards; the highest if all are below."""
    for other in places:
        if other >= place:
            return other
    return places[-1]


def cheapest_from(place: int, places: Sequence[int], tiers: Sequence[TierView]) -> int:
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


def trouble(tier: TierView, seconds_left: float) -> tuple[bool, bool]:
    """Return whether the tier would be too late, and whether its queue is full."""
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


def _verdict(place: int, tier: TierView, considered: Considered) -> tuple[bool, str]:
    """Return whether the tier could have been chosen, and why it was or was not."""
    if place not in considered.allowed:
        return False, "the hints exclude it"
    if not tier.healthy:
        return False, f"not healthy: {tier.unhealthy_reason or 'unknown'}"
    if tier.name in considered.exclude:
        return False, "failed this request"
    if place not in considered.choices:
        return False, "the hints allow no move to another tier"
    if place == considered.chosen:
        return True, _why_chosen(place, considered)
    chosen, seconds_left = considered.tiers[considered.chosen], considered.seconds_left
    if trouble(tier, seconds_left) > trouble(chosen, seconds_left):
        return True, _problem(tier, considered)
    if considered.weighed is not None:
        return True, considered.weighed.reason(place)
    if place > considered.chosen:
        return True, "larger than needed"
    price, other = tier.price, chosen.price
    if price and other and price.prompt + price.completion > other.prompt + other.completion:
        return True, "smaller than the chosen tier, and more expensive"
    return True, f"too small for the score: its threshold is {tier.threshold:.2f}"


def _why_chosen(place: int, considered: Considered) -> str:
    return "chosen" if considered.weighed is None else f"chosen: {considered.weighed.reason(place)}"


def _problem(tier: TierView, considered: Considered) -> str:
    """Return why a tier was not chosen although the request was meant for it."""
    if not tier.healthy:
        return f"cannot serve ({tier.unhealthy_reason or 'not healthy'})"
    if tier.name in considered.exclude:
        return "failed this request"
    if tier.answer_seconds > considered.seconds_left:
        return f"would take {tier.answer_seconds:.1f} s of the {considered.seconds_left:.1f} s left"
    return "has a full queue" if tier.saturated else "is more expensive"


def _why(considered: Considered) -> str:
    score, shifted, tiers = considered.score, considered.shifted, considered.tiers
    wanted, reached = tiers[considered.wanted], tiers[considered.reached]
    ideal, chosen = tiers[considered.ideal], tiers[considered.chosen]
    preference = "" if math.isclose(score, shifted) else f", {shifted:.2f} after the quality preference,"
    if considered.weighed is None:
        inherited = " of the turns that it continues" if considered.continues >= CONTINUES else ""
        why = f"score {score:.2f}{inherited}{preference} is in the range of tier {wanted.name!r}"
    else:
        why = f"tier {wanted.name!r} is best, with {considered.weighed.reason(considered.wanted)}"
    if considered.reached != considered.wanted:
        why += f"; its conversation has reached {reached.name!r}"
    if considered.ideal != considered.reached:
        why += f"; {considered.deciding} moved it to {ideal.name!r}"
    if considered.chosen != considered.ideal:
        why += f"; {ideal.name!r} {_problem(ideal, considered)}, so it goes to {chosen.name!r}"
    return why


def _cause(considered: Considered) -> str:
    if considered.chosen != considered.ideal:
        ideal = considered.tiers[considered.ideal]
        if not ideal.healthy or ideal.name in considered.exclude:
            return "health"
        return "load" if any(trouble(ideal, considered.seconds_left)) else "price"
    if considered.ideal != considered.reached:
        return "hint"
    if considered.reached != considered.wanted:
        return "conversation"
    return "score" if considered.weighed is None else "success"


def _log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))
