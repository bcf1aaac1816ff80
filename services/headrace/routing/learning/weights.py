"""Weigh outcomes: old ones count less, and no reporter counts for more than a bounded share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MOST_SHARE = 0.2  # of all weight, that one reporter may have
_ENOUGH = 50.0  # weight of all others together from which on a reporter's is bounded
_FEW = 5.0  # weight below which a reporter does not count as one


def recency(ages: Array, half_life: float) -> Array:
    """Return weights, 0 to 1, for ages in the unit of *half_life*; 1 for an unknown age (NaN)."""
    weights: Array = 0.5 ** (np.nan_to_num(np.maximum(ages, 0.0)) / half_life)
    return weights


def bounded(weights: Array, reporters: Sequence[str], *, most: float = MOST_SHARE) -> Array:
    """Return *weights*, those of each reporter scaled down to at most the share *most* of the new total.

    If there are fewer than 1 / *most* reporters, each may have an equal share. Nothing is scaled down if all
    others together report hardly anything: that would discard what is known.
    """
    if not len(weights):
        return weights
    names, places = np.unique(np.array(reporters, dtype=object), return_inverse=True)
    totals = np.bincount(places, weights, len(names)).astype(np.float64)
    if totals.sum() - totals.max() < _ENOUGH:
        return weights
    share = max(most, 1 / int((totals >= _FEW).sum()))
    scaled: Array = weights * np.minimum(1.0, _limit(totals, share) / np.maximum(totals, 1e-9))[places]
    return scaled


def _limit(totals: Array, share: float) -> float:
    """Return the largest limit such that no total, cut to it, is more than *share* of their sum."""
    ordered = np.sort(totals)[::-1]
    if share >= 1 or ordered[0] <= share * ordered.sum():
        return float(ordered[0])
    limit = 0.0
    for cut in range(1, len(ordered) + 1):
        # If `cut` totals are cut to the limit L: L = share * (cut * L + the rest).
        if share * cut >= 1:
            break
        limit = share * float(ordered[cut:].sum()) / (1 - share * cut)
        if cut == len(ordered) or limit >= ordered[cut]:
            break
    return limit
