"""Read a scorer and its calibration from their files, at the start and again when they change.

A calibration is valid for one scorer. When both files change, in any order, the old pair stays in use until
the files are a pair again. A file that is not usable is logged and changes nothing.
"""

from __future__ import annotations

import hashlib
import logging
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from headrace.routing import calibration
from headrace.routing.artifact import BadArtifact
from headrace.routing.calibration import BadCalibration, Calibration
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import Objective, Scorer, fingerprint
from headrace.runtime.security.watched_file import stamp_of

log = logging.getLogger(__name__)

MAX_BYTES = 16 << 20  # of a scorer's file

Read: TypeAlias = Literal["used", "rejected", "same"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A scorer, and the calibration that was made with it.

    fingerprint   of the scorer's scores
    content       digest of the scorer's file; empty for the scorer that Headrace ships
    """

    scorer: Scorer
    fingerprint: str
    content: str
    calibration: Calibration | None = None

    @property
    def identity(self) -> str:
        """Identifies scorer and calibration together."""
        return hashlib.sha256(repr((self.content, self.fingerprint, self.calibration)).encode()).hexdigest()


class ScorerFiles:
    """The files of one scorer.

    scorer        path; None: the scorer that Headrace ships
    calibration   path; None: no calibration
    tiers         names that a calibration must be for, smallest first
    shares        whether the router keeps shares, for which a changed calibration needs scores
    objective     what a larger tier shall gain; a refitted scorer ignores it
    by_success    whether the scorer must have the outcomes of all tiers, because they are to decide
    """

    def __init__(
        self,
        scorer: Path | None,
        calibration: Path | None,
        *,
        tiers: Sequence[str],
        shares: bool = False,
        objective: Objective = "both",
        by_success: bool = False,
    ) -> None:
        self._scorer_path, self._calibration_path = scorer, calibration
        self._tiers = tuple(tiers)
        self._shares = shares
        self._objective = objective
        self._by_success = by_success
        self._stamps = self._look()
        self._found = self.loaded = self._load()

    @property
    def changed(self) -> bool:
        """Whether a file has changed since it was read."""
        return self._look() != self._stamps

    def read(self) -> Read:
        """Read the files that have changed; return whether another pair is in use now.

        "same": what was read is in use already. It may be called on another thread, because parsing takes
        milliseconds.
        """
        before, self._stamps = self._stamps, self._look()
        scorer_before, calibration_before = before
        scorer_now, calibration_now = self._stamps
        found, usable = self._found, True
        try:
            if scorer_now != scorer_before:
                found = replace(self._read_scorer(), calibration=found.calibration)
        except BadArtifact as error:
            log.error("scorer not usable, keeping the old one", extra={"problem": str(error)})
            found, usable = replace(self.loaded, calibration=found.calibration), False
        try:
            if calibration_now != calibration_before:
                found = replace(found, calibration=self._read_changed_calibration())
        except BadCalibration as error:
            log.error("calibration not usable, keeping the old one", extra={"problem": str(error)})
            found, usable = replace(found, calibration=self.loaded.calibration), False
        self._found = found
        made = found.calibration
        if made is not None and made.scorer != found.fingerprint:
            log.warning(
                "scorer and calibration are no pair, keeping the old ones",
                extra={
                    "scorer": str(self._scorer_path or "shipped"),
                    "calibration": str(self._calibration_path),
                    "problem": f"the calibration is of another scorer than {found.fingerprint}",
                },
            )
            return "rejected"
        if found.identity == self.loaded.identity:
            return "same" if usable else "rejected"
        self.loaded = found
        return "used"

    def _load(self) -> Loaded:
        """Read both files. Raises BadArtifact or BadCalibration."""
        found = self._read_scorer()
        if self._calibration_path is None:
            return found
        made = self._read_calibration(self._calibration_path)
        if made.scorer != found.fingerprint:
            raise BadCalibration(
                f"{self._calibration_path} was made with another scorer or --objective, so its thresholds "
                "are not valid: calibrate again"
            )
        return replace(found, calibration=made)

    def _read_changed_calibration(self) -> Calibration:
        """Read the calibration, which must have scores if shares are kept. Raises BadCalibration."""
        assert self._calibration_path is not None, "its stamp has changed"
        made = self._read_calibration(self._calibration_path)
        if self._shares and not made.quantiles:
            raise BadCalibration(f"{self._calibration_path} has no scores for --share to start with")
        return made

    def _read_scorer(self) -> Loaded:
        path, content = self._scorer_path, ""
        if path is not None:
            content = _digest(path)
        read = scorer.load(path, self._objective)
        known = () if read.model.tiers is None else read.model.tiers.tiers
        missing = [tier for tier in self._tiers if tier not in known]
        if self._by_success and missing:
            raise BadArtifact(
                f"{path or 'the scorer that Headrace ships'} has no outcomes of {', '.join(missing)}, which "
                "--choose-by success and --budget-per-day need: headrace train ROWS --out FILE --tiers "
                f"{','.join(self._tiers)}"
            )
        return Loaded(read, fingerprint(read), content)

    def _read_calibration(self, path: Path) -> Calibration:
        made = calibration.load(path)
        if made.tiers != self._tiers:
            raise BadCalibration(
                f"{path} is for the tiers {', '.join(made.tiers)}, the router has {', '.join(self._tiers)}"
            )
        return made

    def _look(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        first, second = self._scorer_path, self._calibration_path
        return (
            None if first is None else stamp_of(first),
            None if second is None else stamp_of(second),
        )


def _digest(path: Path) -> str:
    """Return a digest of a regular file. A pipe, which could block, and an endless device are rejected."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise BadArtifact(f"{path} is not a scorer: not a file of at most {MAX_BYTES >> 20} MiB")
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadArtifact(f"{path} cannot be read: {error.strerror or error}") from error
