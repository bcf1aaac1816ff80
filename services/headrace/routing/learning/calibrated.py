"""Measure estimated probabilities against outcomes: Brier score and calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_BINS = 5


@dataclass(frozen=True, slots=True)
class Bin:
    """The estimates of one range: their number, their mean, and the mean of the outcomes; weighted."""

    count: int
    expected: float
    actual: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """How well probabilities estimate outcomes. Means are weighted.

    mean    outcome
    brier   mean squared error
    base    mean squared error of the mean outcome, the same for every row
    error   expected calibration error: mean distance of the bins' means
    bins    of equal weight as far as rows allow, lowest estimates first
    """

    rows: int
    mean: float
    brier: float
    base: float
    error: float
    bins: tuple[Bin, ...]


def calibrated(
    expected: Array, actual: Array, weights: Array | None = None, *, bins: int = _BINS
) -> Calibrated:
    """Measure *expected* probabilities [rows] against *actual* outcomes [rows], 0 to 1; at least one.

    weights   [rows], how much each counts; all 1 if None, or if all are 0
    """
    each = np.ones(len(actual)) if weights is None or not weights.any() else weights
    share = each / each.sum()
    order = np.argsort(expected, kind="stable")
    middles = np.cumsum(share[order]) - share[order] / 2
    place = np.minimum((bins * middles).astype(np.int64), bins - 1)
    found, error = [], 0.0
    for part in (order[place == one] for one in range(bins)):
        if (weight := float(share[part].sum())) > 0:
            means = (float(share[part] @ values[part]) / weight for values in (expected, actual))
            found.append(Bin(len(part), *means))
            error += weight * abs(found[-1].expected - found[-1].actual)
    mean = float(share @ actual)
    return Calibrated(
        rows=len(actual),
        mean=mean,
        brier=float(share @ (expected - actual) ** 2),
        base=float(share @ (actual - mean) ** 2),
        error=error,
        bins=tuple(found),
    )
