"""Measure how many things happen per second, over the last few seconds."""

from __future__ import annotations

from collections import deque


class RateMeter:
    """Counts over a sliding window; the caller brings the clock.

    window   seconds that the rate looks back
    """

    def __init__(self, window: float = 5.0) -> None:
        self._window = window
        self._counts: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, now: float, count: int = 1) -> None:
        """Book *count* things at *now* seconds."""
        # One entry per 50 ms keeps a busy window at a hundred entries.
        if self._counts and now - self._counts[-1][0] < 0.05:
            last, before = self._counts[-1]
            self._counts[-1] = (last, before + count)
        else:
            self._counts.append((now, count))
        self._sum += count
        self._forget(now)

    def per_second(self, now: float) -> float:
        """Things per second over the window that ends at *now*."""
        self._forget(now)
        if not self._counts:
            return 0.0
        # A meter that has just begun is not diluted by the time before.
        span = min(self._window, max(now - self._counts[0][0], 0.5))
        return self._sum / span

    def _forget(self, now: float) -> None:
        while self._counts and self._counts[0][0] <= now - self._window:
            self._sum -= self._counts.popleft()[1]
