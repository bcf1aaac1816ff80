"""Limit how fast a batcher's stream is read: as fast as it sends work, and up to a fixed rate otherwise.

A message takes about 0.1 ms of the event loop. Messages that are not read stay with the sender, by gRPC's
flow control, so a batcher that sends without end slows down only itself.
"""

from __future__ import annotations

WORK = frozenset({"submit", "cancel", "ack"})
WORK_SECONDS = 0.0005  # 2,000 messages per second
OTHER_SECONDS = 0.02  # batchers ping each second
BURST_SECONDS = 1.0  # worth of messages that may arrive at once


class Allowance:
    """The message rate of one stream; a leaky bucket (the generic cell rate algorithm, ITU-T I.371)."""

    def __init__(self, now: float) -> None:
        self._due = now - BURST_SECONDS

    def wait(self, kind: str | None, now: float) -> float:
        """Count a message that was read. Returns the seconds until the next one may be read.

        kind   the set member of RunRequest's `message`; None for a member of a later version
        now    monotonic seconds
        """
        self._due = max(self._due, now - BURST_SECONDS) + (WORK_SECONDS if kind in WORK else OTHER_SECONDS)
        return max(self._due - now, 0.0)
