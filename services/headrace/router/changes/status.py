"""Report how the routing is being changed: scorer in use, canary, shadow answers and decision log.

The processes of one router add up what their metrics have counted.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace import attributes
from headrace.metrics import changes
from headrace.metrics.instruments import Counter
from headrace.router.changes.canary import CANARY, RULES, Arm, Canary
from headrace.router.changes.scorers import Scorers
from headrace.router.siblings import Siblings
from headrace.router.state.thresholds import CONTROL
from headrace.routing.changes.verdict import Verdict
from headrace.v1 import routing_changes_pb2 as pb

_TOPIC = "changes"


class Status:
    """The state of the changes, for ListTiers and Inspect.

    canary   None: there is none
    """

    def __init__(self, scorers: Scorers, canary: Canary | None, siblings: Siblings) -> None:
        self._scorers = scorers
        self._canary = canary
        self._siblings = siblings
        siblings.on_ask(_TOPIC, self._own_counts)

    async def changes(self) -> pb.RoutingChanges:
        """Return the state of all processes."""
        total: dict[str, float] = {}
        for counts in (await self._own_counts(), *await self._siblings.ask_all(_TOPIC)):
            for name, count in counts.items():
                total[name] = total.get(name, 0.0) + count
        state = pb.RoutingChanges(scorer=self._scorers.fingerprint())
        if self._canary is not None:
            state.canary.CopyFrom(_canary_state(self._canary, self._scorers.fingerprint(CANARY)))
        if "shadow" in total:
            state.shadow.CopyFrom(_shadow_figures(total))
        if "log" in total:
            state.decision_log.rows = int(total["rows"])
            state.decision_log.dropped = int(total["dropped"])
        return state

    async def _own_counts(self) -> Mapping[str, float]:
        """Return what this process has counted. "shadow" and "log" are there if they are in use."""
        verdicts = {verdict: _sum(changes.SHADOW_VERDICTS, verdict) for verdict in ("better", "worse", "tie")}
        shadow = {
            "requests": _sum(changes.SHADOW_REQUESTS),
            "skipped": _sum(changes.SHADOW_SKIPPED),
            "tokens": _sum(changes.SHADOW_TOKENS),
            **verdicts,
        }
        log = {"rows": _sum(changes.DECISION_LOG_ROWS), "dropped": _sum(changes.DECISION_LOG_DROPPED)}
        return {
            **({"shadow": 1, **shadow} if any(shadow.values()) else {}),
            **({"log": 1, **log} if any(log.values()) else {}),
            **({"cost": cost} if (cost := _sum(changes.SHADOW_COST)) else {}),
        }


def _canary_state(canary: Canary, fingerprint: str) -> pb.CanaryState:
    state = canary.state()
    quality = state.verdicts["quality"]
    return pb.CanaryState(
        scorer=fingerprint,
        share=state.share,
        rolled_back=state.rolled_back,
        control=_arm_figures(state.arms[CONTROL], quality, 0),
        candidate=_arm_figures(state.arms[CANARY], quality, 1),
        measures=[
            pb.CanaryMeasure(
                name=name,
                p_value=verdict.p_value,
                limit=RULES[name].alpha,
                outcomes=verdict.counts[1],
                fewest=RULES[name].fewest,
            )
            for name, verdict in state.verdicts.items()
        ],
    )


def _arm_figures(arm: Arm, quality: Verdict, place: int) -> pb.ArmFigures:
    figures = pb.ArmFigures(requests=arm.requests, failed=arm.failed, rated=quality.counts[place])
    if (badness := quality.means[place]) is not None:
        figures.quality = 1 - badness
    if arm.cost is not None and arm.requests:
        figures.cost = arm.cost / arm.requests
    return figures


def _shadow_figures(total: Mapping[str, float]) -> pb.ShadowFigures:
    figures = pb.ShadowFigures(
        requests=int(total["requests"]),
        skipped=int(total["skipped"]),
        tokens=int(total["tokens"]),
        better=int(total["better"]),
        worse=int(total["worse"]),
        ties=int(total["tie"]),
    )
    if "cost" in total:
        figures.cost = total["cost"]
    return figures


def _sum(metric: Counter, verdict: str = "") -> float:
    """Return the sum of the series, or of those with a verdict."""
    return sum(
        series.value for labels, series in metric if not verdict or labels.get(attributes.VERDICT) == verdict
    )
