"""Weigh outcomes: old ones count less, and no reporter counts for more than a bounded share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MOST_SHARE = 0.2  # of all weight, that one reporter may have
_FEWEST = 50.0  # weight of all others together from which on a reporter's is bounded
_ENOUGH = 500.0  # of which more would hardly improve a fit
_FEW = 5.0  # weight below which a reporter does not count as one


def recency(ages: Array, half_life: float) -> Array:
    """Return weights, 0 to 1, for ages in the unit of *half_life*; 1 for an unknown age (NaN)."""
    weights: Array = 0.5 ** (np.nan_to_num(np.maximum(ages, 0.0)) / half_life)
    return weights


def bounded(weights: Array, reporters: Sequence[str], *, most: float = MOST_SHARE) -> Array:
    """Return *weights*, those of each reporter scaled down to at most the share *most* of the new total.

    If there are fewer than 1 / *most* reporters, each may have an equal share. The share is larger where the
    bound would discard what is known: that of the other reporters than the largest is not scaled down below
    half of their weight, or `_ENOUGH` of it. If they report hardly anything, nothing is scaled down.
    """
    if not len(weights):
        return weights
    _, places = np.unique(np.array(reporters, dtype=object), return_inverse=True)
    totals = np.bincount(places, weights).astype(np.float64)
    ordered = np.sort(totals)[::-1]
    others = float(ordered[1:].sum())
    if others < _FEWEST:
        return weights
    share = max(most, 1 / max(int((totals >= _FEW).sum()), 1))
    limit = max(_limit(ordered, share), _level(ordered[1:], min(_ENOUGH, others / 2)))
    scaled: Array = weights * np.minimum(1.0, limit / np.maximum(totals, 1e-9))[places]
    return scaled


def _limit(ordered: Array, share: float) -> float:
    """Return the largest limit such that no total, cut to it, is more than *share* of their sum.

    ordered   totals, descending
    """
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


def _level(ordered: Array, wanted: float) -> float:
    """Return the limit to which totals must be cut so that their sum is *wanted*, which is at most theirs.

    ordered   totals, descending
    """
    rest = np.cumsum(ordered[::-1])[::-1] - ordered  # of the totals after each
    limits = (wanted - rest) / np.arange(1, len(ordered) + 1)
    return float(limits[np.argmax(limits >= np.append(ordered[1:], 0.0))])
