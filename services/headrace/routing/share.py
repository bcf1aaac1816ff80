"""Hold a wanted share of calls per tier, whatever the traffic scores. Plain arithmetic.

A threshold that gives 30 % large calls on one kind of prompts gives 5 % or 90 % on another. So the
thresholds are quantiles of the scores seen last. They follow a shift of the traffic only as fast as the
window fills with it, and meanwhile too many or too few calls would go up: what has been called too much
is therefore kept as a debt, and lowers the share that is asked of the window, until it is paid back. That
bounds the error whatever the traffic does: of any n calls, the ones sent to a tier differ from its share of
n by at most `correction` + 1 where there are two tiers, and `correction` + 2 where there are more. With the
default and 200 calls that is 5 points at most.

With more than two tiers debts may ask for more calls to one tier or above than to the tier below it or above,
which cannot be. Where they do, both get the mean: to let one give way to the other leaves it with a debt that
grows without bound.
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
    window       scores that are remembered
    correction   debt, in calls, that makes up for a whole share of 1, at least 2: smaller holds the share
                 closer, larger leaves more to the scores. On shuffled families of real prompts the quality
                 at the same share did not differ between 8 and 48, and was lower without any correction
    seen         scores to begin with, such as those of the traffic that was calibrated on
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

    def begin_with(self, seen: Iterable[float]) -> None:
        """Put other scores in the place of those that are remembered; debts stay."""
        self._scores.clear()
        self._scores.extend(seen)
        self._sorted = sorted(self._scores)

    def thresholds(self) -> list[float]:
        """The thresholds now, one per tier, ascending from 0."""
        wanted = [
            share - debt / self._correction for share, debt in zip(self._shares, self._debts, strict=True)
        ]
        return [0.0, *(self._quantile(share) for share in _descending(wanted))]

    def note(self, score: float, place: int) -> None:
        """Book a call of *score* that the thresholds sent to the tier at *place*."""
        if len(self._scores) == self._scores.maxlen:
            del self._sorted[bisect_left(self._sorted, self._scores[0])]
        self._scores.append(score)
        insort(self._sorted, score)
        self._owe(place)

    def escalated(self, before: int, after: int) -> None:
        """Book that a call that was noted at *before* went on to *after*."""
        for tier in range(before, after):
            self._debts[tier] = min(self._debts[tier] + 1.0, self._correction)

    def _owe(self, place: int) -> None:
        for tier, share in enumerate(self._shares):
            debt = self._debts[tier] + (place > tier) - share
            # Bounded: an hour of forced calls is not paid back by an hour of none.
            self._debts[tier] = min(max(debt, -self._correction), self._correction)

    def _quantile(self, share: float) -> float:
        """The lowest score of the top *share* of the window."""
        count = len(self._sorted)
        top = round(share * count)
        if not count:
            return 0.0 if share >= 0.5 else NEVER
        if top <= 0:
            return NEVER
        return 0.0 if top >= count else self._sorted[count - top]


def _descending(values: Sequence[float]) -> list[float]:
    """The nearest values that descend, by least squares: those that rise share their mean.

    The min-max formula of isotonic regression (Robertson, Wright & Dykstra, 1988).
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
