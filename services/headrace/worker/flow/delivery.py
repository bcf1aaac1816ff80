"""Carry the runner's reports from its thread to the event loop, those of several steps together.

A message costs a fraction of a millisecond of CPU time in each process that it passes, however few tokens it
has. On a machine whose cores compute the model, that time is taken from the steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Generic

from headrace.worker.runner import K, StepReport


class Delivery(Generic[K]):
    """Delivers reports in order, on the event loop in which it is made.

    A report waits for the next one, if that is expected soon enough. It does not if a sequence has ended, or
    its first token may be there.

    seconds   the longest pause between deliveries for which reports wait; 0 for none
    deliver   called with one or more reports
    waits     whether reports wait at all
    """

    def __init__(self, seconds: float, deliver: Callable[[list[StepReport[K]]], None]) -> None:
        self.waits = True
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._deliver = deliver
        self._reports: deque[StepReport[K]] = deque()
        self._delivered = -math.inf  # time.monotonic() of the last delivery
        self._timer: asyncio.TimerHandle | None = None
        self._due = False  # whether a delivery is scheduled, at the latest when the pause ends
        self._due_now = False  # whether it is scheduled without a pause

    def add(self, report: StepReport[K]) -> None:
        """Add a report; on any thread, but never twice at a time. While the loop is behind, they gather."""
        self._reports.append(report)
        # Appended before the tests, and taken after `_run` has cleared the flags: no report is left behind.
        if self._due and (self._due_now or self._may_wait(report)):
            return
        self._due = self._due_now = True
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._run)

    def _may_wait(self, report: StepReport[K]) -> bool:
        """Return whether the next report, after a step like this one, is probably early enough."""
        return time.monotonic() - self._delivered + report.seconds <= self._seconds and not urgent(report)

    def _run(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = self._due_now = False
        reports = [self._reports.popleft() for _ in range(len(self._reports))]
        if not reports:
            return
        if self._seconds and self.waits:
            self._delivered = time.monotonic()
            self._due = True
            self._timer = self._loop.call_later(self._seconds, self._run)
        self._deliver(reports)


def urgent(report: StepReport[K]) -> bool:
    """Whether a sequence has ended, or its first token may be there: the step computed prompts too."""
    decoded_only = report.rows > 0 and report.tokens == report.decodes
    return not decoded_only or any(update.finish is not None for update in report.updates)
