"""Find the tier that another scorer or other thresholds would have chosen. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.routing.no_route import NoRoute
from headrace.routing.policy import Decision, decide
from headrace.routing.request import Hints


def allowed(decision: Decision) -> list[str]:
    """Return the names of the tiers that the request's hints allow."""
    considered = decision.considered
    return [considered.tiers[place].name for place in considered.allowed]


def would_choose(decision: Decision, score: float, hints: Hints, thresholds: Sequence[float]) -> str:
    """Return the tier for *score* and *thresholds*, with the tiers as at *decision*; empty without one."""
    considered = decision.considered
    tiers = [
        replace(tier, threshold=threshold)
        for tier, threshold in zip(considered.tiers, thresholds, strict=True)
    ]
    moved = considered.reached > considered.wanted
    try:
        return decide(
            score,
            hints,
            tiers,
            floor=tiers[considered.reached].name if moved else "",
            seconds_left=considered.seconds_left,
            exclude=considered.exclude,
        ).tier
    except NoRoute:
        return ""
