"""Estimate waiting and computing times from measurements, for admission and retry delays.

Plain functions and running means. Without measurements there is no estimate, and every request is admitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RETRY_SECONDS = (0.1, 30.0)  # the bounds of a suggested retry delay


class RunningMean:
    """An exponentially weighted mean.

    weight   share of the newest value
    """

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self.count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        """Add a value. The first values are weighted equally."""
        self.count += 1
        self.value += max(self._weight, 1 / self.count) * (value - self.value)


class ArrivalRate:
    """The current rate of requests: the inverse of the geometric mean of the last few gaps.

    A geometric mean detects a burst after a long silence within a handful of requests.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._log_gap = RunningMean(weight=0.25)

    def add(self, now: float) -> None:
        """Record a request that arrived at *now*."""
        if self._last is not None:
            self._log_gap.add(math.log(min(max(now - self._last, 1e-5), 10.0)))
        self._last = now

    def per_second(self, now: float) -> float:
        """Return the rate at *now*; 0 before the second request."""
        if self._last is None or not self._log_gap.count:
            return 0.0
        return 1 / max(math.exp(self._log_gap.value), now - self._last)


@dataclass(frozen=True, slots=True)
class Estimates:
    """The measured rates and the backlog of all workers of a tier together.

    prefill_rate   prompt tokens per second; 0 while unknown
    step_seconds   time between two tokens of one answer; 0 while unknown
    backlog        prompt tokens that wait at the workers to be computed
    drain_rate     jobs per second that leave the queue as slots become free; 0 while unknown or while slots
                   are free
    """

    prefill_rate: float = 0.0
    step_seconds: float = 0.0
    backlog: int = 0
    drain_rate: float = 0.0

    def first_token_seconds(self, *, jobs: int, ahead: int, tokens: int) -> float:
        """Return a lower bound of the time until a job has its first token.

        jobs     the number of jobs that are served before it
        ahead    tokens to compute for the first tokens of those jobs
        tokens   tokens to compute for its own first token: the uncached part of its prompt
        """
        slot = (jobs + 1) / self.drain_rate if self.drain_rate > 0 else 0.0
        prefill = (self.backlog + ahead + tokens) / self.prefill_rate if self.prefill_rate > 0 else 0.0
        return max(slot, prefill)

    def decode_seconds(self, tokens: int) -> float:
        """Return a lower bound of the time from the first token to the last of *tokens*."""
        return max(tokens - 1, 0) * self.step_seconds


def retry_after(waiting: int, drain_rate: float) -> float:
    """Return the delay after which a rejected caller should retry: when half of the queue has been served.

    waiting      the number of requests that wait
    drain_rate   requests per second that leave the queue for a worker; 0 while unknown
    """
    low, high = RETRY_SECONDS
    if drain_rate <= 0:
        return 1.0
    return min(max(waiting / 2 / drain_rate, low), high)
