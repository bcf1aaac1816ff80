"""Keep what the server's end of a shared stream knows about one of its requests."""

from __future__ import annotations

import asyncio

from headrace.deadline import NEVER
from headrace.runtime.serving.fair_semaphore import Permit


class StreamRequest:
    """A request of a stream.

    credit     events that may be sent in all; infinity for no limit
    sent       events so far
    deadline   of the whole answer
    late       whether it was cancelled because its deadline has passed
    starting   held until its first event
    """

    __slots__ = ("credit", "deadline", "handle", "has_credit", "late", "sent", "starting", "task")

    def __init__(self, handle: int, credit: float, starting: Permit) -> None:
        self.handle = handle
        self.starting = starting
        self.credit = credit
        self.deadline = NEVER
        self.late = False
        self.sent = 0
        self.has_credit: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None] | None = None

    def grant(self, events: float) -> None:
        """Raise the credit to *events*."""
        self.credit = max(self.credit, events)
        if self.has_credit is not None and not self.has_credit.done():
            self.has_credit.set_result(None)
