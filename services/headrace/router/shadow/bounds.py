"""Bound what the shadow does: requests per minute, requests at a time, and cost per day.

Time is an argument. The bounds are those of one process.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from headrace.router.state.quota import Quota

Bound: TypeAlias = Literal["rate", "concurrency", "cost"]

DAY_SECONDS = 86_400


class Bounds:
    """The bounds of one process.

    per_minute     most requests in a minute, above 0
    concurrency    most requests at a time
    cost_per_day   most cost per day in UTC; infinite: no bound. The cost of a request is known at its end, so
                   an estimate is set aside while it runs
    """

    def __init__(self, *, per_minute: float, concurrency: int, cost_per_day: float = math.inf) -> None:
        at_once = max(per_minute, 1.0)
        self._rate = Quota(at_once, 60.0 * at_once / per_minute, tenants=1)
        self._concurrency = concurrency
        self._cost_per_day = cost_per_day
        self._running = 0
        self._set_aside = 0.0
        self._day = -1
        self._spent = 0.0

    def reached(self, estimate: float, now: float, today: float) -> Bound | None:
        """Return the bound that another request would exceed; None if it may begin.

        estimate   its cost
        now        in seconds, on any clock
        today      seconds since the epoch
        """
        if self._running >= self._concurrency:
            return "concurrency"
        self._start_day(today)
        left = self._cost_per_day - self._spent - self._set_aside
        if left <= 0 or left < estimate:
            return "cost"
        return "rate" if self._rate.wait("", 1, now) > 0 else None

    def begin(self, estimate: float, now: float) -> None:
        """Count a request that begins."""
        self._rate.take("", 1, now)
        self._running += 1
        self._set_aside += estimate

    def end(self, estimate: float, cost: float, today: float) -> None:
        """Count a request that has ended, with the estimate that it began with and its real cost."""
        self._start_day(today)
        self._running -= 1
        self._set_aside = max(self._set_aside - estimate, 0.0) if self._running else 0.0
        self._spent += cost

    def _start_day(self, today: float) -> None:
        if (day := int(today // DAY_SECONDS)) != self._day:
            self._day, self._spent = day, 0.0
