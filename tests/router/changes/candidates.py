"""Scorers that send everything to the largest tier, or nothing, for tests of changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from headrace.routing import calibration
from headrace.routing.calibration import Calibration
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import fingerprint
from headrace.routing.scoring.scorer import LearnedScorer

ALL_LARGE, ALL_SMALL = -1.0, 1.0  # centres at which every score is 1 or 0


def write(path: Path, centre: float) -> Path:
    """Write the shipped scorer with another centre, at which the score is 0.5."""
    scorer.save(replace(scorer.load().model, centre=centre), path)
    return path


def write_calibration(path: Path, centre: float, threshold: float, *, scores: bool = False) -> Path:
    """Write a calibration of that scorer for the tiers small and large."""
    of = LearnedScorer(replace(scorer.load().model, centre=round(centre, 5)))
    quantiles = tuple(place / 100 for place in range(101)) if scores else ()
    made = Calibration(("small", "large"), (0.0, threshold), (0.5, 0.5), fingerprint(of), 10, quantiles)
    calibration.save(made, path)
    return path
