"""Send a small share of requests to a tier that is drawn at random. Pure functions.

What would have happened on another tier can only be estimated from requests that chance has sent there. The
probability of each choice is known exactly, so `estimating.py` can undo its effect on averages.
"""

from __future__ import annotations

import math
from dataclasses import replace

from headrace.routing.policy import Considered, Decision, cheapest_from, escalations, trouble
from headrace.routing.request import RoutingRequest


def may_explore(request: RoutingRequest) -> bool:
    """Whether chance may choose the tier: the request has no pin and leaves the choice to the router.

    Bounds are kept. A quality preference of 0 or 1 demands the smallest or the largest tier.
    """
    hints = request.hints
    pinned = bool(hints.tier or hints.model) or not hints.allow_escalation
    return request.scored and not request.resumes and not pinned and 0 < hints.quality_preference < 1


def explorable(considered: Considered) -> list[int]:
    """Return the places that chance may choose, ascending; the chosen one is among them.

    All are allowed, healthy, in time for the deadline and without a full queue. None is below the tier that
    the conversation has reached, or below the chosen one where no tier reaches that; and none is more
    expensive than a larger one. If the chosen tier itself is late or full, there is no other.
    """
    tiers, chosen = considered.tiers, considered.chosen
    if any(trouble(tiers[chosen], considered.seconds_left)):
        return [chosen]
    usable = [
        place
        for place in considered.choices
        if tiers[place].healthy
        and tiers[place].name not in considered.exclude
        and not any(trouble(tiers[place], considered.seconds_left))
    ]
    if considered.weighed is not None:
        good, reached = considered.weighed.good, considered.weighed.reached
        least = min(good[reached], good[chosen]) if reached >= 0 else 0.0
        return [place for place in usable if good[place] >= least]
    lowest = min(considered.floor, chosen)
    return [place for place in usable if place >= lowest and cheapest_from(place, usable, tiers) == place]


def explore(decision: Decision, share: float, draw: float) -> Decision:
    """Return the decision after chance: in a *share* of cases, each explorable tier is equally probable.

    share   0 to 1
    draw    uniform in [0, 1): the only randomness
    """
    considered = decision.considered
    places = explorable(considered)
    if share <= 0 or len(places) < 2:
        return decision
    each = share / len(places)
    chances = tuple((place, each + (1 - share if place == considered.chosen else 0.0)) for place in places)
    place = considered.chosen
    if draw < share:
        place = places[min(math.floor(draw / share * len(places)), len(places) - 1)]
    moved = replace(decision, propensity=dict(chances)[place], chances=chances)
    if place == considered.chosen:
        return moved
    tiers = considered.tiers
    serving = [
        other
        for other in considered.choices
        if tiers[other].healthy and tiers[other].name not in considered.exclude
    ]
    return replace(
        moved,
        tier=tiers[place].name,
        place=place,
        escalations=escalations(place, serving, tiers, considered.weighed),
    )
