"""Keep the cost of all requests near a budget per day, by the weight that cost has in decisions.

The budget is meant to be spent evenly over a day in UTC. What was spent beyond that plan is a debt, and the
weight of cost grows exponentially with it: the dual descent of adaptive pacing (Balseiro & Gur, Learning in
Repeated Auctions with Budgets, 2019). Credit of quiet hours may be spent later on the same day.
"""

from __future__ import annotations

import math

DAY = 86_400.0
_STEP = DAY / 48  # a debt of half an hour's budget multiplies the weight by e
_MOST_STEPS = 8.0  # beyond, cost alone decides; as much credit lets quality alone decide


class Budget:
    """What was spent today, and the factor that follows for the weight of cost. Time is an argument.

    per_day   in the currency of the prices
    now       seconds since 1970. What was spent before is not known, so the plan is assumed to have been
              kept: a restart brings neither credit nor debt
    """

    def __init__(self, per_day: float, now: float) -> None:
        self._per_day = per_day
        self._day = math.floor(now / DAY)
        self._spent = self._planned(now)

    def spend(self, cost: float, now: float) -> None:
        """Record the cost of a request."""
        self._turn(now)
        self._spent += cost

    def factor(self, now: float) -> float:
        """Return the factor of the weight of cost: 0 to infinity, and 1 if spending is on plan."""
        self._turn(now)
        debt = self._spent - self._planned(now)
        steps = debt / (self._per_day * _STEP / DAY)
        if self._spent >= self._per_day or steps > _MOST_STEPS:
            return math.inf
        return 0.0 if steps < -_MOST_STEPS else math.exp(steps)

    def _planned(self, now: float) -> float:
        return self._per_day * (now / DAY - self._day)

    def _turn(self, now: float) -> None:
        """Begin a new day if one has begun: with the debt of the last one, and without its credit."""
        if (day := math.floor(now / DAY)) != self._day:
            debt = max(self._spent - self._per_day, 0.0) if day == self._day + 1 else 0.0
            # A clock that was set back must not make the plan negative.
            self._day = day
            self._spent = min(debt, self._per_day * _MOST_STEPS * _STEP / DAY)
