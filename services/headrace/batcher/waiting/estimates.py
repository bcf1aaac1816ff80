"""Judge how long things take, from what was measured: whether a deadline can be met, when to come back.

Plain functions and running means. Nothing measured means no judgement: then everybody may try.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RETRY_SECONDS = (0.1, 30.0)  # bounds of what a caller is told to wait


class Mean:
    """A running mean that follows changes.

    weight   share of the newest value
    """

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self.seen = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        """Book a value. The first ones count evenly."""
        self.seen += 1
        self.value += max(self._weight, 1 / self.seen) * (value - self.value)


class Arrivals:
    """How often requests come just now: one over the geometric mean of the last few gaps.

    Geometric, so that a burst after a long silence is seen after a handful of requests.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._gap = Mean(weight=0.25)  # of logarithms

    def add(self, now: float) -> None:
        """A request came."""
        if self._last is not None:
            self._gap.add(math.log(min(max(now - self._last, 1e-5), 10.0)))
        self._last = now

    def per_second(self, now: float) -> float:
        """The rate as of *now*; 0 while only one has come."""
        if self._last is None or not self._gap.seen:
            return 0.0
        return 1 / max(math.exp(self._gap.value), now - self._last)


@dataclass(frozen=True, slots=True)
class Pace:
    """What the workers of a tier do now, taken together.

    prefill        prompt tokens per second; 0 while unknown
    step_seconds   time between two tokens of one answer; 0 while unknown
    backlog        prompt tokens that wait at the workers to be computed
    drained        jobs per second that leave the queue because a worker has room again; 0 while unknown
                   or while there is room
    """

    prefill: float = 0.0
    step_seconds: float = 0.0
    backlog: int = 0
    drained: float = 0.0

    def first_token_in(self, *, jobs: int, ahead: int, tokens: int) -> float:
        """Least seconds until a job has its first token.

        jobs, ahead   how many are served before it, and what has to be computed for their first tokens
        tokens        what has to be computed for its own: its prompt, but for what a worker has of it
        """
        room = (jobs + 1) / self.drained if self.drained > 0 else 0.0
        prefill = (self.backlog + ahead + tokens) / self.prefill if self.prefill > 0 else 0.0
        return max(room, prefill)

    def tokens_in(self, count: int) -> float:
        """Least seconds from the first token to the last of *count*."""
        return max(count - 1, 0) * self.step_seconds


def retry_after(waiting: int, drained_per_second: float) -> float:
    """When a caller that finds no place should come back: when half of the queue has been served.

    waiting              how many wait
    drained_per_second   how many leave the queue for a worker; 0 while unknown
    """
    low, high = RETRY_SECONDS
    if drained_per_second <= 0:
        return 1.0
    return min(max(waiting / 2 / drained_per_second, low), high)
