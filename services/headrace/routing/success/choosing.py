"""Choose by expected quality less the weighted expected cost. Pure functions; tiers need not be ordered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Weighed:
    """How good and how expensive the answer of each tier to one request will probably be.

    good     [tiers], probability that it is good enough
    cost     [tiers], expected cost, in any currency
    weight   probability of a good answer that one unit of cost is worth: 0 considers quality alone,
             infinity cost alone
    reached  place of the tier that the conversation has reached, or -1: one that is less likely to answer
             well is used only if all are
    previous place of the tier that answered the previous turn of the conversation, or -1
    """

    good: tuple[float, ...]
    cost: tuple[float, ...]
    weight: float
    reached: int = -1
    previous: int = -1

    def after(self, place: int) -> Weighed:
        """Return the same for a conversation that has reached the tier at *place*."""
        return replace(self, reached=place)

    def best(self, places: Sequence[int]) -> int:
        """Return the best of *places*, of which there is at least one; of equal ones the cheaper, then the
        one more likely to answer well, then the smaller one.
        """
        return max(places, key=self._rank)

    def not_below(self, places: Sequence[int]) -> Sequence[int]:
        """Return those of *places* that are as good as the conversation requires; all if none is."""
        if self.reached < 0:
            return places
        least = self.good[self.reached]
        return [place for place in places if self.good[place] >= least] or places

    def better_than(self, place: int, places: Sequence[int]) -> list[int]:
        """Return those of *places* with a higher probability of a good answer than *place*, best first."""
        found = [other for other in places if self.good[other] > self.good[place]]
        return sorted(found, key=self._rank, reverse=True)

    def reason(self, place: int) -> str:
        """Return what speaks for a tier, in few words."""
        good, cost = self.good[place], self.cost[place]
        if math.isinf(self.weight):
            return f"expected cost {cost:.3g}"
        if not self.weight:
            return f"P(good) {good:.2f}"
        return f"P(good) {good:.2f} - cost {self.weight * cost:.2f} = {good - self.weight * cost:.2f}"

    def _rank(self, place: int) -> tuple[float, ...]:
        good, cost = self.good[place], self.cost[place]
        if math.isinf(self.weight):
            return -cost, good, -place
        return good - self.weight * cost, -cost, good, -place  # a large weight leaves nothing of `good`


def cost_weight(base: float, preference: float) -> float:
    """Return the weight of cost for a request's quality preference.

    base   at a preference of 0.5; 0 considers cost alone, and 1 quality alone
    """
    if preference <= 0:
        return math.inf
    if preference >= 1:
        return 0.0
    return base * (1 - preference) / preference
