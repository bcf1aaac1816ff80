"""Keep work away from a worker that keeps failing: a circuit breaker (Nygard, Release It!, 2007).

Closed until *threshold* faults of the worker follow each other without a success between; then open for a
pause that doubles each time; then half open: one probe decides. A fault counts only if it hit a request that
no earlier one of them had hit: what a single request fails of may be the request. Plain data, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from enum import Enum

_REMEMBERED = 1024  # requests


class State(Enum):
    """Whether work passes."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


@dataclass(slots=True)
class Breaker:
    """One worker's breaker; give it only the worker's own faults.

    threshold       faults in a row that open it
    pause, longest  seconds that it stays open at first, and at most
    """

    threshold: int = 3
    pause: float = 1.0
    longest: float = 30.0
    _faults: int = 0
    _openings: int = 0
    _opened: float | None = None
    _probing: bool = False
    _hit: dict[Hashable, None] = field(default_factory=dict)  # requests, since the last success

    def state(self, now: float) -> State:
        """Where it stands at *now* seconds."""
        if self._opened is None:
            return State.CLOSED
        return State.OPEN if now < self._opened + self._pause() else State.HALF_OPEN

    def room(self, now: float, room: int) -> int:
        """How many of *room* sequences may go to the worker: all, none, or one probe."""
        state = self.state(now)
        if state is State.CLOSED:
            return room
        return 0 if state is State.OPEN or self._probing else min(room, 1)

    def sent(self) -> None:
        """A sequence goes to the worker: the probe, if one is due."""
        self._probing = self._opened is not None

    def succeed(self) -> None:
        """A sequence ended well there."""
        self._faults = self._openings = 0
        self._opened = None
        self._probing = False
        self._hit.clear()

    def fail(self, now: float, requests: Collection[Hashable] = ()) -> None:
        """The worker failed. Counted once for each incident, not for each sequence that it hit.

        requests   whose sequences it hit; not counted if each of them was hit before. None: it hit no
                   request, and counts
        """
        if requests and all(request in self._hit for request in requests):
            self.forgive()
            return
        self._hit |= dict.fromkeys(requests)
        while len(self._hit) > _REMEMBERED:
            del self._hit[next(iter(self._hit))]
        self._faults += 1
        if self._opened is not None or self._faults >= self.threshold:
            # What fails after the opening belongs to the same trouble, unless it was the probe.
            if self._opened is None or self._probing:
                self._openings += 1
                self._opened = now
            self._probing = False

    def forgive(self) -> None:
        """The probe came back without a verdict, such as by its caller's leaving: another one may go."""
        self._probing = False

    def _pause(self) -> float:
        return float(min(self.pause * 2.0 ** (self._openings - 1), self.longest))
