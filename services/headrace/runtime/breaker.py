"""Stop sending work to a peer that keeps failing: a circuit breaker (Nygard, Release It!, 2007).

The peer is a worker of a batcher, or a URL of an upstream. The breaker is closed until *threshold* faults of
the peer occur without a success in between. Then it is open for a pause, which doubles each time. Then it is
half open: one probe decides. A fault counts only if it affects a request that no earlier fault affected,
because repeated faults of one request may be caused by the request. Plain data: the caller passes the current
time.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from enum import Enum

_MAX_REMEMBERED = 1024  # requests


class BreakerState(Enum):
    """Whether work is sent: yes, no, or one probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


@dataclass(slots=True)
class CircuitBreaker:
    """The circuit breaker of one peer. Record only faults of the peer itself.

    threshold       consecutive faults that open it
    pause, longest  seconds that it stays open: at first, and at most
    """

    threshold: int = 3
    pause: float = 1.0
    longest: float = 30.0
    _faults: int = 0
    _openings: int = 0
    _opened: float | None = None
    _probing: bool = False
    _affected: dict[Hashable, None] = field(default_factory=dict)  # requests, since the last success

    def state(self, now: float) -> BreakerState:
        """Return the state at *now* seconds."""
        if self._opened is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._opened + self._pause() else BreakerState.HALF_OPEN

    def allowed(self, now: float, count: int = 1) -> int:
        """Return how many of *count* requests may be sent to the peer: all, none, or one probe."""
        state = self.state(now)
        if state is BreakerState.CLOSED:
            return count
        return 0 if state is BreakerState.OPEN or self._probing else min(count, 1)

    def sent(self) -> None:
        """Record that a request is sent to the peer: the probe, if one is due."""
        self._probing = self._opened is not None

    def record_success(self) -> None:
        """Record a request that completed. Closes the breaker."""
        self._faults = self._openings = 0
        self._opened = None
        self._probing = False
        self._affected.clear()

    def record_fault(self, now: float, requests: Collection[Hashable] = ()) -> None:
        """Record a fault of the peer, once per incident and not per affected request.

        requests   the affected requests; the fault does not count if earlier faults affected all of them. If
                   it affected none, it counts
        """
        if requests and all(request in self._affected for request in requests):
            self.release_probe()
            return
        self._affected |= dict.fromkeys(requests)
        while len(self._affected) > _MAX_REMEMBERED:
            del self._affected[next(iter(self._affected))]
        self._faults += 1
        if self._opened is not None or self._faults >= self.threshold:
            # Faults of requests that were sent before it opened do not prolong the pause; a probe's does.
            if self._opened is None or self._probing:
                self._openings += 1
                self._opened = now
            self._probing = False

    def release_probe(self) -> None:
        """Allow another probe: the last one ended without a result, for example because its caller left."""
        self._probing = False

    def _pause(self) -> float:
        return float(min(self.pause * 2.0 ** (self._openings - 1), self.longest))
