"""Measure a rate over a sliding window."""

from __future__ import annotations

from collections import deque


class RateMeter:
    """Counts events over a sliding window. The current time is an argument.

    window   its length in seconds
    """

    def __init__(self, window: float = 5.0) -> None:
        self._window = window
        self._counts: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, now: float, count: int = 1) -> None:
        """Count *count* events at time *now*, in seconds."""
        # One entry per 50 ms limits a window to a hundred entries.
        if self._counts and now - self._counts[-1][0] < 0.05:
            last, before = self._counts[-1]
            self._counts[-1] = (last, before + count)
        else:
            self._counts.append((now, count))
        self._sum += count
        self._forget(now)

    def per_second(self, now: float) -> float:
        """Return the events per second over the window that ends at *now*."""
        self._forget(now)
        if not self._counts:
            return 0.0
        # A new meter is not averaged over time before its first event.
        span = min(self._window, max(now - self._counts[0][0], 0.5))
        return self._sum / span

    def _forget(self, now: float) -> None:
        while self._counts and self._counts[0][0] <= now - self._window:
            self._sum -= self._counts.popleft()[1]
