"""Keep the cost of all requests near a budget per day, by the weight that cost has in decisions.

The plan for a day in UTC follows the requests of the day before: an hour with twice as many gets nearly
twice the budget. Without such a day, all hours get the same. What was spent beyond the plan is a debt, and
the weight of cost grows exponentially with it: the dual descent of adaptive pacing (Balseiro & Gur, Learning
in Repeated Auctions with Budgets, 2019). Credit of quiet hours may be spent later on the same day.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

DAY = 86_400.0
_HOURS = 24
_EVEN = 0.2  # part of the budget that all hours share alike, whatever the day before was like
_ENOUGH = 200  # requests of a day from which on the next one is planned like it
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
        self._requests = [0] * _HOURS
        self._plan = _plan(self._requests)
        self._spent = self._planned(now)
        self._open = 0.0  # expected cost of the requests that have not ended

    def expect(self, cost: float, now: float) -> None:
        """Count the expected cost of a request until it has ended, when *cost* is the negative of it."""
        self._turn(now)
        self._open += cost

    def spend(self, cost: float, now: float) -> None:
        """Record the cost of a request that has ended."""
        self._turn(now)
        self._spent += cost
        self._requests[int(self._hour(now))] += 1

    def factor(self, now: float) -> float:
        """Return the factor of the weight of cost: 0 to infinity, and 1 if spending is on plan."""
        self._turn(now)
        spent = self._spent + self._open
        debt = spent - self._planned(now)
        steps = debt / (self._per_day * _STEP / DAY)
        if spent >= self._per_day or steps > _MOST_STEPS:
            return math.inf
        return 0.0 if steps < -_MOST_STEPS else math.exp(steps)

    def _planned(self, now: float) -> float:
        hour = self._hour(now)
        whole = int(hour)
        part = self._plan[whole] + (hour - whole) * (self._plan[whole + 1] - self._plan[whole])
        return self._per_day * part

    def _hour(self, now: float) -> float:
        """Return the hour of the day, from 0 to just below 24."""
        return min(max(now / DAY - self._day, 0.0) * _HOURS, _HOURS - 1e-6)

    def _turn(self, now: float) -> None:
        """Begin a new day if one has begun: with the debt of the last one, and without its credit."""
        if (day := math.floor(now / DAY)) < self._day:
            # The clock was set back. As after a start, it is not known what was spent on that day.
            self._day, self._requests = day, [0] * _HOURS
            self._spent = self._planned(now)
        elif day > self._day:
            next_day = day == self._day + 1  # else the clock was set, or there was a day without requests
            debt = max(self._spent - self._per_day, 0.0) if next_day else 0.0
            self._plan = _plan(self._requests if next_day else [0] * _HOURS)
            self._day, self._requests = day, [0] * _HOURS
            self._spent = min(debt, self._per_day * _MOST_STEPS * _STEP / DAY)


def _plan(requests: Sequence[int]) -> list[float]:
    """Return the part of a budget that may be spent by the beginning of each hour and by the day's end.

    requests   in each hour of the day before
    """
    total = sum(requests)
    even = 1.0 if total < _ENOUGH else _EVEN
    plan = [0.0]
    for count in requests:
        plan.append(plan[-1] + even / _HOURS + (1 - even) * (count / total if total else 0.0))
    return plan
