"""Keep the tiers' thresholds: as configured, as calibrated, or adapted to a configured share of calls.

The scorer in use and a candidate beside it have thresholds of their own, because those of one scorer are
meaningless for another. With configured shares, a calibration does not set the thresholds. Its scores replace
the recent scores, and the thresholds follow from them and from the traffic afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.router.optional import optional
from headrace.routing.calibration import Calibration
from headrace.routing.share import ShareKeeper

CONTROL = ""  # the arm of the scorer in use, as in `RoutingRequest.arm`


class Thresholds:
    """The current thresholds of the tiers, by arm.

    fixed    thresholds without a calibration, one per tier, ascending from 0
    shares   of calls for each tier after the first, kept for any traffic; empty: fixed thresholds
    """

    def __init__(self, fixed: Sequence[float], *, shares: Sequence[float] = ()) -> None:
        self._fixed = tuple(fixed)
        self._shares = tuple(shares)
        self._arms: dict[str, _Arm] = {}
        self.use(None)

    def use(self, calibration: Calibration | None, arm: str = CONTROL) -> None:
        """Use the thresholds of a new scorer, or of a new calibration.

        What was learned from earlier scores is dropped, except for the debts of the shares: they are counted
        in calls, so a share is kept across the change. Without a calibration, the window of scores is empty
        at first, and the debts alone keep the share.
        """
        fixed = self._fixed if calibration is None else calibration.thresholds
        seen = () if calibration is None else _shuffled(calibration.quantiles)
        before = self._arms.get(arm)
        keeper = None if before is None else before.keeper
        if keeper is not None:
            keeper.restart(seen)
        elif self._shares:
            keeper = ShareKeeper(self._shares, seen=seen)
        self._arms[arm] = _Arm(fixed, keeper)

    def now(self, arm: str = CONTROL) -> list[float]:
        """The thresholds, one per tier, ascending from 0."""
        own = self._arm(arm)
        if own.keeper is not None:
            with optional("share"):
                return own.keeper.thresholds()
        return list(own.fixed)

    def record(self, score: float, place: int, arm: str = CONTROL) -> None:
        """Record a call of *score* that the thresholds alone sent to the tier at *place*."""
        if (keeper := self._arm(arm).keeper) is not None:
            keeper.record(score, place)

    def record_escalation(self, before: int, after: int, arm: str = CONTROL) -> None:
        """Record that a call that was recorded at place *before* was answered at place *after*."""
        if (keeper := self._arm(arm).keeper) is not None:
            keeper.record_escalation(before, after)

    def _arm(self, arm: str) -> _Arm:
        return self._arms.get(arm) or self._arms[CONTROL]


class _Arm:
    """The thresholds of one scorer: fixed ones, or those that keep the shares."""

    def __init__(self, fixed: Sequence[float], keeper: ShareKeeper | None) -> None:
        self.fixed = tuple(fixed)
        self.keeper = keeper


def _shuffled(quantiles: Sequence[float]) -> list[float]:
    """Return every seventh quantile, then the next ones, so that each part of the list is a fair sample."""

    return [value for start in range(7) for value in quantiles[start::7]]
