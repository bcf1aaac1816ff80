"""Keep the tiers' thresholds: as set, as calibrated, or moving so that a wanted share of calls is held.

A calibration's file is read again when it changes; one that cannot be used changes nothing but the log. With
wanted shares, a calibration does not set thresholds: the scores that it was made from take the place of those
seen last, and the thresholds follow from them and from the traffic after them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from headrace.router.optional import optional
from headrace.routing import calibration
from headrace.routing.calibration import BadCalibration, Calibration
from headrace.routing.share import ShareKeeper

log = logging.getLogger(__name__)


class Thresholds:
    """The lowest score of each tier, as of now.

    tiers    names, smallest first
    fixed    thresholds to use without a calibration, one per tier, ascending from 0
    path     a calibration's file; None without one
    scorer   fingerprint of the scorer in use: a calibration of another one is refused
    shares   of calls for each tier after the first, to be held whatever the traffic scores; empty: none

    Raises BadCalibration for a file that cannot be used from the start.
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
        self._stamp: tuple[int, int, int] | None = None
        seen: tuple[float, ...] = ()
        if path is not None:
            self._stamp = _stamp(path)
            made = self._read(path)
            self._now, seen = list(made.thresholds), made.quantiles
        self._keeper = ShareKeeper(shares, seen=_shuffled(seen)) if shares else None

    def now(self) -> list[float]:
        """The thresholds, one per tier, ascending from 0."""
        if self._keeper is not None:
            with optional("share"):
                return self._keeper.thresholds()
        return list(self._now)

    def note(self, score: float, place: int) -> None:
        """Book a call of *score* that the thresholds alone sent to the tier at *place*."""
        if self._keeper is not None:
            self._keeper.note(score, place)

    def escalated(self, before: int, after: int) -> None:
        """Book that a call that was noted at the place *before* went on to *after*."""
        if self._keeper is not None:
            self._keeper.escalated(before, after)

    async def watch(self, poll_seconds: float) -> None:
        """Look at the file every so often, until cancelled."""
        while self._path is not None:
            await asyncio.sleep(poll_seconds)
            with optional("calibration"):
                self.look()

    def look(self) -> None:
        """Read the file again if it has changed."""
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
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
                    extra={"problem": f"{self._path} holds no scores for --share to begin with"},
                )
                return
            self._keeper.begin_with(_shuffled(made.quantiles))
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
                f"{path} was made with another scorer: its thresholds mean nothing now; calibrate again"
            )
        return made


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What differs when the file does; a file put in its place has another inode."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _shuffled(quantiles: Sequence[float]) -> list[float]:
    """The quantiles in an order in which those that leave the window first are a fair sample: by sevens."""
    return [value for start in range(7) for value in quantiles[start::7]]
