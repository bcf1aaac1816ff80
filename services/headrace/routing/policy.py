"""Choose a tier: from the score, the caller's hints, the tiers' state and the time left. Pure functions.

Tiers are ordered from small to large and each has the lowest score that it is meant for; the largest
whose threshold the score reaches is wanted. A conversation keeps the tier that it has reached. Hints
bound the choice. Health, the deadline and full queues may move it: up first, for the answer gets no
worse, then down; and a larger tier that costs less than the one wanted is taken in its place. Whatever
the tiers' state, a higher score never means a smaller tier.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from headrace import errors
from headrace.routing.score import sigmoid


@dataclass(frozen=True, slots=True)
class Price:
    """What tokens cost, per million, in any one currency.

    cached_prompt   of a prompt, found computed already; None: as any others of it
    """

    prompt: float
    completion: float
    cached_prompt: float | None = None

    def cost(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
        """What so many tokens cost, *cached_tokens* of the prompt's found computed already."""
        cached = self.prompt if self.cached_prompt is None else self.cached_prompt
        computed = prompt_tokens - cached_tokens
        return (computed * self.prompt + cached_tokens * cached + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True, slots=True)
class TierView:
    """A tier as the policy sees it.

    threshold       the lowest score that it is meant for; the first tier's is 0
    model           what it serves; empty while unknown
    models          all that it serves, where that may be several: behind it stands a router
    saturated       its queue is full: what is sent there now would be refused
    answer_seconds  how long it is expected to take for this request, queue included; 0 while unknown
    price           what its tokens cost; None where no price is set
    """

    name: str
    threshold: float
    healthy: bool = True
    model: str = ""
    unhealthy_reason: str = ""
    saturated: bool = False
    answer_seconds: float = 0.0
    price: Price | None = None
    models: frozenset[str] = frozenset()

    def serves(self, model: str) -> bool:
        """Whether it answers with *model*."""
        return model in self.models or model == self.model


@dataclass(frozen=True, slots=True)
class Hints:
    """What the caller wishes; empty strings and the defaults wish nothing. See headrace.v1.Routing."""

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
class Candidate:
    """One tier, and what spoke for or against it."""

    tier: TierView
    eligible: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and why, in one sentence.

    wanted      place of the tier that the score asks for, before hints and the tiers' state
    place       place of the tier that it goes to
    escalations names of the tiers that may take over from it, nearest first, all larger
    """

    tier: str
    why: str
    candidates: tuple[Candidate, ...]
    wanted: int
    place: int
    escalations: tuple[str, ...]


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
    score: float,
    hints: Hints,
    tiers: Sequence[TierView],
    *,
    floor: str = "",
    slack: float | None = None,
    exclude: Collection[str] = (),
) -> Decision:
    """Choose the tier for a prompt of *score*, 0 to 1.

    tiers     at least one, smallest first, thresholds ascending
    floor     the tier that the conversation has reached; empty: none
    slack     seconds that are left for the answer; None: no deadline
    exclude   tiers that were tried and failed this request

    Raises UnknownTier, UnknownModel or HintsConflict for hints that no tier can meet, and NoWorkers when
    the tiers that they allow are not healthy.
    """
    allowed, wish = _allowed(hints, tiers)
    shifted = shift(score, hints.quality_preference)
    wanted = _wanted(shifted, hints.quality_preference, tiers)
    reached = max(wanted, _place(floor, tiers))
    ideal = _at_or_above(reached, allowed)
    # Without escalation there is no second choice.
    choices = allowed if hints.allow_escalation else [ideal]
    serving = [place for place in choices if tiers[place].healthy and tiers[place].name not in exclude]
    if not serving:
        raise _nobody(choices, tiers)
    # Of those that can serve, the ones that will be in time; of those, the ones with room.
    best = min(_trouble(tiers[place], slack) for place in serving)
    fit = [place for place in serving if _trouble(tiers[place], slack) == best]
    chosen = _cheapest_from(_at_or_above(ideal, fit), fit, tiers)
    return Decision(
        tier=tiers[chosen].name,
        why=_why(score, shifted, [wanted, reached, ideal, chosen], wish, tiers, slack=slack, exclude=exclude),
        candidates=tuple(
            Candidate(tier, *_judge(place, chosen, tiers, allowed, choices, exclude, slack))
            for place, tier in enumerate(tiers)
        ),
        wanted=wanted,
        place=chosen,
        escalations=tuple(tiers[place].name for place in serving if place > chosen),
    )


def _wanted(score: float, preference: float, tiers: Sequence[TierView]) -> int:
    # The two extremes are meant as they are said, wherever the thresholds stand.
    if preference in (0, 1):
        return 0 if preference == 0 else len(tiers) - 1
    return max(place for place, tier in enumerate(tiers) if not place or score >= tier.threshold)


def _at_or_above(place: int, places: Sequence[int]) -> int:
    """The nearest of *places* from *place* upwards; below, where there is none above."""
    return min((other for other in places if other >= place), default=places[-1])


def _cheapest_from(place: int, places: Sequence[int], tiers: Sequence[TierView]) -> int:
    """The cheapest of *places* from *place* upwards: nobody pays more for a smaller model.

    Prompt and completion prices are weighed alike. Tiers without a price stay out of it.
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


def _trouble(tier: TierView, slack: float | None) -> tuple[bool, bool]:
    return (slack is not None and tier.answer_seconds > slack, tier.saturated)


def _place(name: str, tiers: Sequence[TierView]) -> int:
    return next((place for place, tier in enumerate(tiers) if tier.name == name), 0)


def _nobody(choices: Sequence[int], tiers: Sequence[TierView]) -> errors.NoWorkers:
    names = ", ".join(tiers[place].name for place in choices)
    problems = "; ".join(
        f"{tiers[place].name}: {tiers[place].unhealthy_reason or 'failed this request'}" for place in choices
    )
    return errors.NoWorkers(
        f"no tier that the request allows ({names}) can serve it now ({problems}); try again shortly",
        retry_after=1.0,
    )


def _allowed(hints: Hints, tiers: Sequence[TierView]) -> tuple[list[int], str]:
    """The places of the tiers that the hints allow, ascending, and which hint decides, for the why."""
    places = {tier.name: place for place, tier in enumerate(tiers)}
    for field in ("tier", "min_tier", "max_tier"):
        name = getattr(hints, field)
        if name and name not in places:
            raise errors.UnknownTier(
                f"routing.{field} is {errors.quoted(name)}; the tiers are {', '.join(places)}",
                field=f"routing.{field}",
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
        asked_of, allowed = allowed, [place for place in allowed if tiers[place].serves(hints.model)]
        silent = [tiers[place].name for place in asked_of if not tiers[place].model]
        if not allowed and silent:
            # An answer that is carried on after a restart names a model, maybe before its tier is seen.
            raise errors.NoWorkers(
                f"routing.model is {errors.quoted(hints.model)}, and what {', '.join(silent)} serves is not "
                "known yet; "
                "try again shortly",
                retry_after=1.0,
            )
        if not any(tier.serves(hints.model) for tier in tiers):
            known = ", ".join(
                sorted({model for tier in tiers for model in tier.models or {tier.model} if model})
            )
            raise errors.UnknownModel(
                f"routing.model is {errors.quoted(hints.model)}; the models are {known}",
                field="routing.model",
            )
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
    tiers: Sequence[TierView],
    allowed: Sequence[int],
    choices: Sequence[int],
    exclude: Collection[str],
    slack: float | None,
) -> tuple[bool, str]:
    """Whether the tier could have been chosen, and why it was or was not."""
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
    if _trouble(tier, slack) > _trouble(tiers[chosen], slack):
        return True, _problem(tier, slack)
    if place > chosen:
        return True, "larger than needed"
    price, other = tier.price, tiers[chosen].price
    if price and other and price.prompt + price.completion > other.prompt + other.completion:
        return True, "smaller than the one chosen, and dearer"
    return True, f"too small for the score, meant for {tier.threshold:.2f} and up to the next"


def _problem(tier: TierView, slack: float | None, exclude: Collection[str] = ()) -> str:
    """Why a tier did not get what was meant for it."""
    if not tier.healthy:
        return f"cannot serve ({tier.unhealthy_reason or 'not healthy'})"
    if tier.name in exclude:
        return "failed this request"
    if slack is not None and tier.answer_seconds > slack:
        return f"would take {tier.answer_seconds:.1f} s of the {slack:.1f} s left"
    return "has a full queue" if tier.saturated else "is dearer"


def _why(
    score: float,
    shifted: float,
    steps: Sequence[int],
    wish: str,
    tiers: Sequence[TierView],
    *,
    slack: float | None,
    exclude: Collection[str],
) -> str:
    wanted, reached, ideal, chosen = steps
    preference = "" if math.isclose(score, shifted) else f", {shifted:.2f} after the quality preference,"
    why = f"score {score:.2f}{preference} is in the range of tier {tiers[wanted].name!r}"
    if reached != wanted:
        why += f"; its conversation has reached {tiers[reached].name!r}"
    if ideal != reached:
        why += f"; {wish} moved it to {tiers[ideal].name!r}"
    if chosen != ideal:
        why += f"; {tiers[ideal].name!r} {_problem(tiers[ideal], slack, exclude)}, "
        why += f"so it goes to {tiers[chosen].name!r}"
    return why


def _log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))
