"""Keep the tiers' thresholds: as configured, as calibrated, or adapted to a configured share of calls.

A calibration file is read again when it changes; a file that is not usable is logged and changes nothing.
With configured shares, a calibration does not set the thresholds. Its scores replace the recent scores, and
the thresholds follow from them and from the traffic afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from headrace.router.optional import optional
from headrace.routing import calibration
from headrace.routing.calibration import BadCalibration, Calibration
from headrace.routing.share import ShareKeeper
from headrace.runtime.security.watched_file import stamp_of

log = logging.getLogger(__name__)


class Thresholds:
    """The current thresholds of the tiers.

    tiers    names, smallest first
    fixed    thresholds without a calibration, one per tier, ascending from 0
    path     of a calibration file; None: no calibration
    scorer   fingerprint of the scorer in use: a calibration of another scorer is rejected
    shares   of calls for each tier after the first, kept for any traffic; empty: fixed thresholds

    Raises BadCalibration if the file is not usable at the start.
    """

    def __init__(
        self,
        tiers: Sequence[str],
        fixed: Sequence[float],
        *,
        path: Path | None = None,
        scorer: str = "",
        shares: Sequence[float] = (),
    ) -> None:
        self._tiers = tuple(tiers)
        self._scorer = scorer
        self._path = path
        self._now = list(fixed)
        self._stamp: tuple[int, ...] | None = None
        seen: tuple[float, ...] = ()
        if path is not None:
            self._stamp = stamp_of(path)
            made = self._read(path)
            self._now, seen = list(made.thresholds), made.quantiles
        self._keeper = ShareKeeper(shares, seen=_shuffled(seen)) if shares else None

    def now(self) -> list[float]:
        """The thresholds, one per tier, ascending from 0."""
        if self._keeper is not None:
            with optional("share"):
                return self._keeper.thresholds()
        return list(self._now)

    def record(self, score: float, place: int) -> None:
        """Record a call of *score* that the thresholds alone sent to the tier at *place*."""
        if self._keeper is not None:
            self._keeper.record(score, place)

    def record_escalation(self, before: int, after: int) -> None:
        """Record that a call that was recorded at place *before* was answered at place *after*."""
        if self._keeper is not None:
            self._keeper.record_escalation(before, after)

    async def watch(self, poll_seconds: float) -> None:
        """Poll the file until cancelled."""
        while self._path is not None:
            await asyncio.sleep(poll_seconds)
            with optional("calibration"):
                self.refresh()

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        if self._path is None or (stamp := stamp_of(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            made = self._read(self._path)
        except BadCalibration as error:
            log.error("calibration not usable, keeping the old one", extra={"problem": str(error)})
            return
        if self._keeper is not None:
            if not made.quantiles:
                log.error(
                    "calibration not usable, keeping the old one",
                    extra={"problem": f"{self._path} has no scores for --share to start with"},
                )
                return
            self._keeper.restart(_shuffled(made.quantiles))
        self._now = list(made.thresholds)
        log.info("calibration read", extra={"thresholds": self.now(), "rows": made.rows})

    def _read(self, path: Path) -> Calibration:
        made = calibration.load(path)
        if made.tiers != self._tiers:
            raise BadCalibration(
                f"{path} is for the tiers {', '.join(made.tiers)}, the router has {', '.join(self._tiers)}"
            )
        if made.scorer != self._scorer:
            raise BadCalibration(
                f"{path} was made with another scorer, so its thresholds are not valid: calibrate again"
            )
        return made


def _shuffled(quantiles: Sequence[float]) -> list[float]:
    """Return every seventh quantile, then the next ones, so that each part of the list is a fair sample."""

    return [value for start in range(7) for value in quantiles[start::7]]
