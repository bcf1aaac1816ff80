"""Measure estimated probabilities against outcomes: Brier score and calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_BINS = 5


@dataclass(frozen=True, slots=True)
class Bin:
    """The estimates of one range: their number, their mean, and the mean of the outcomes."""

    count: int
    expected: float
    actual: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """How well probabilities estimate outcomes.

    brier   mean squared error
    base    mean squared error of the mean outcome, the same for every row
    error   expected calibration error: mean distance of the bins' means, by their number of rows
    bins    of equal numbers of estimates, lowest first
    """

    rows: int
    brier: float
    base: float
    error: float
    bins: tuple[Bin, ...]


def calibrated(expected: Array, actual: Array, *, bins: int = _BINS) -> Calibrated:
    """Measure *expected* probabilities [rows] against *actual* outcomes [rows], 0 to 1; at least one."""
    order = np.argsort(expected, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    found = tuple(Bin(len(part), float(expected[part].mean()), float(actual[part].mean())) for part in parts)
    return Calibrated(
        rows=len(actual),
        brier=float(((expected - actual) ** 2).mean()),
        base=float(((actual - actual.mean()) ** 2).mean()),
        error=sum(each.count * abs(each.expected - each.actual) for each in found) / len(actual),
        bins=found,
    )
