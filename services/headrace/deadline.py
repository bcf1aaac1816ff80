"""Represent a deadline as one value: a time on the monotonic clock, or never.

gRPC sends a deadline as the time left. Each process converts it to a `Deadline` once, when the request
arrives, and passes the value on. The current time is always an argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Servers report a missed deadline this many seconds before gRPC ends the call, so that the caller gets the
# reason.
DEADLINE_MARGIN = 0.02


@dataclass(frozen=True, slots=True, order=True)
class Deadline:
    """The latest time at which a result is useful. Deadlines are ordered by it.

    at   seconds on the clock of `time.monotonic`; infinity: no deadline
    """

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float | None, now: float) -> Deadline:
        """Return the deadline *seconds* after *now*; None means no deadline."""
        return NEVER if seconds is None else cls(now + seconds)

    @property
    def exists(self) -> bool:
        """Whether there is a deadline at all."""
        return self.at != math.inf

    @property
    def timeout_at(self) -> float | None:
        """The time as an argument of `asyncio.timeout_at`."""
        return self.at if self.exists else None

    def left(self, now: float) -> float:
        """Return the seconds left at *now*: negative after the deadline, infinite if there is none."""
        return self.at - now

    def passed(self, now: float) -> bool:
        """Whether the deadline has passed at *now*."""
        return now >= self.at

    def earlier_by(self, seconds: float) -> Deadline:
        """Return a deadline *seconds* before this one."""
        return Deadline(self.at - seconds)


NEVER = Deadline()


def response_deadline(deadline: Deadline) -> Deadline:
    """Return when a response must be sent for the caller to receive it before *deadline*."""
    return deadline.earlier_by(DEADLINE_MARGIN)
