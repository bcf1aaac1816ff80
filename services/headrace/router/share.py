"""Hold a wanted share of calls per tier, whatever the traffic scores. Plain arithmetic.

A threshold that gives 30 % large calls on one kind of prompts gives 5 % or 90 % on another. So the
thresholds are quantiles of the scores seen last. They follow a shift of the traffic only as fast as the
window fills with it, and meanwhile too many or too few calls would go up: what has been called too much
is therefore kept as a debt, and lowers the share that is asked of the window, until it is paid back. That
bounds the error whatever the traffic does: of any n calls, the ones sent to a tier or above differ from
their share of n by at most `correction` + 1; with the default and 200 calls, by less than 5 points.
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
    correction   debt, in calls, that makes up for a whole share of 1: smaller holds the share closer,
                 larger leaves more to the scores. On shuffled families of real prompts the quality at the
                 same share did not differ between 8 and 48, and was lower without any correction
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

    def thresholds(self) -> list[float]:
        """The thresholds now, one per tier, ascending from 0."""
        marks = [
            self._quantile(share - debt / self._correction)
            for share, debt in zip(self._shares, self._debts, strict=True)
        ]
        # Ascending also while debts differ: the smaller tier's mark bows to the larger one's.
        for place in reversed(range(len(marks) - 1)):
            marks[place] = min(marks[place], marks[place + 1])
        return [0.0, *marks]

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
