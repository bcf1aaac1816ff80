"""Find the tier that another scorer or other thresholds would have chosen. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.routing.no_route import NoRoute
from headrace.routing.policy import Decision, decide
from headrace.routing.request import Hints
from headrace.routing.success.choosing import Weighed


def allowed(decision: Decision) -> list[str]:
    """Return the names of the tiers that the request's hints allow."""
    considered = decision.considered
    return [considered.tiers[place].name for place in considered.allowed]


def floor_of(decision: Decision) -> str:
    """Return the tier that the request's conversation had reached; empty without one."""
    considered = decision.considered
    if considered.weighed is not None:
        place = considered.weighed.reached
        return considered.tiers[place].name if place >= 0 else ""
    return considered.tiers[considered.floor].name if considered.floor else ""


def would_choose(
    decision: Decision,
    score: float,
    hints: Hints,
    thresholds: Sequence[float],
    weighed: Weighed | None = None,
) -> str:
    """Return the tier that another policy would choose, with the tiers as at *decision*; empty without one.

    score, thresholds   of that policy
    weighed             what it expects of each tier's answer; None: it chooses by score
    """
    considered = decision.considered
    tiers = [
        replace(tier, threshold=threshold)
        for tier, threshold in zip(considered.tiers, thresholds, strict=True)
    ]
    try:
        return decide(
            score,
            hints,
            tiers,
            floor=floor_of(decision),
            seconds_left=considered.seconds_left,
            exclude=considered.exclude,
            weighed=weighed,
        ).tier
    except NoRoute:
        return ""
