"""Keep a configured share of calls per tier for any traffic, by moving the tiers' thresholds.

A threshold that gives 30 % large calls on one kind of prompt gives 5 % or 90 % on another. The thresholds
here are quantiles of the most recent scores. When the traffic changes, quantiles alone are wrong until the
window has filled with the new traffic. Past overshoot and undershoot is therefore kept as a debt in calls,
which lowers or raises the share that the quantile is taken for. That bounds the error for any traffic: among
any n calls, the calls of a tier differ from its share of n by at most `correction` + 1 with two tiers, and
`correction` + 2 with more. With the default and 200 calls that is at most 5 percentage points.

With more than two tiers, debts may ask for more calls to a tier and above than to the tier below it and
above, which is impossible. Both then get the mean: if one had priority, the other's debt would grow without
bound.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence

NEVER = math.inf  # a threshold that no score reaches


class ShareKeeper:
    """Moves the tiers' thresholds so that each tier after the first gets its share of calls.

    shares       of each tier after the first, smallest first; together at most 1
    window       number of scores that are kept
    correction   debt, in calls, that changes a share by 1; at least 2. A smaller value keeps the share more
                 closely, a larger one leaves more to the scores. On shuffled families of real prompts, the
                 quality at the same share did not differ between 8 and 48, and was lower without correction
    seen         initial scores, such as those of the traffic that a calibration was made from
    """

    def __init__(
        self,
        shares: Sequence[float],
        *,
        window: int = 128,
        correction: float = 8.0,
        seen: Iterable[float] = (),
    ) -> None:
        self._scores: deque[float] = deque(seen, maxlen=window)
        self._sorted = sorted(self._scores)
        self._correction = correction
        # Cumulative from the top: the share that goes to this tier or above.
        self._shares = [sum(shares[place:]) for place in range(len(shares))]
        self._debts = [0.0] * len(shares)

    def restart(self, seen: Iterable[float]) -> None:
        """Replace the scores in the window; debts stay."""
        self._scores.clear()
        self._scores.extend(seen)
        self._sorted = sorted(self._scores)

    def thresholds(self) -> list[float]:
        """Return the current thresholds, one per tier, ascending from 0."""
        wanted = [
            share - debt / self._correction for share, debt in zip(self._shares, self._debts, strict=True)
        ]
        return [0.0, *(self._quantile(share) for share in _descending(wanted))]

    def record(self, score: float, place: int) -> None:
        """Record a call of *score* that the thresholds sent to the tier at *place*."""
        if len(self._scores) == self._scores.maxlen:
            del self._sorted[bisect_left(self._sorted, self._scores[0])]
        self._scores.append(score)
        insort(self._sorted, score)
        self._add_debt(place)

    def record_escalation(self, before: int, after: int) -> None:
        """Record that a call that was recorded at place *before* was answered at place *after*."""
        for tier in range(before, after):
            self._debts[tier] = min(self._debts[tier] + 1.0, self._correction)

    def _add_debt(self, place: int) -> None:
        for tier, share in enumerate(self._shares):
            debt = self._debts[tier] + (place > tier) - share
            # Bounded, so that an hour of too many calls is not followed by an hour of none.
            self._debts[tier] = min(max(debt, -self._correction), self._correction)

    def _quantile(self, share: float) -> float:
        """Return the lowest score of the top *share* of the window."""
        count = len(self._sorted)
        top = round(share * count)
        if not count:
            return 0.0 if share >= 0.5 else NEVER
        if top <= 0:
            return NEVER
        return 0.0 if top >= count else self._sorted[count - top]


def _descending(values: Sequence[float]) -> list[float]:
    """Return the nearest descending values by least squares: values that rise get their mean.

    This is the min-max formula of isotonic regression (Robertson, Wright & Dykstra, 1988).
    """

    count = len(values)
    means = {
        (start, stop): sum(values[start:stop]) / (stop - start)
        for start in range(count)
        for stop in range(start + 1, count + 1)
    }
    return [
        min(max(means[start, stop] for stop in range(place + 1, count + 1)) for start in range(place + 1))
        for place in range(count)
    ]
