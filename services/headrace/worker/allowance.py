"""Decide how fast a batcher's stream is read: as fast as work comes, and no faster than a peer may ask.

A message takes some 0.1 ms of the event loop. What is not read stays with its sender, by gRPC's flow control,
so a batcher that sends without end slows down itself alone.
"""

from __future__ import annotations

WORK = frozenset({"submit", "cancel", "ack"})
WORK_SECONDS = 0.0005  # 2,000 messages a second
OTHER_SECONDS = 0.02  # batchers ping each second
BURST_SECONDS = 1.0  # of messages that may come at once


class Allowance:
    """What one stream may send; a leaky bucket (the generic cell rate algorithm, ITU-T I.371)."""

    def __init__(self, now: float) -> None:
        self._due = now - BURST_SECONDS

    def wait(self, kind: str | None, now: float) -> float:
        """Count a message that was read, and return the seconds until the next one may be.

        kind   the set member of RunRequest's `message`; None if it is of a later version
        now    monotonic seconds
        """
        self._due = max(self._due, now - BURST_SECONDS) + (WORK_SECONDS if kind in WORK else OTHER_SECONDS)
        return max(self._due - now, 0.0)
