"""Carry the runner's reports from its thread to the event loop, those of several steps together.

A message costs a fraction of a millisecond of CPU time in each process that it passes, however few tokens it
has. On a machine whose cores compute the model, that time is taken from the steps.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Generic

from headrace.worker.runner import K, StepReport


class Delivery(Generic[K]):
    """Delivers reports in order, on the event loop in which it is made.

    seconds   pause after a delivery, which reports that cannot wait end; 0 for none
    deliver   called with one or more reports
    pauses    whether a pause follows the next delivery
    """

    def __init__(self, seconds: float, deliver: Callable[[list[StepReport[K]]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self.pauses = True
        self._seconds = seconds
        self._deliver = deliver
        self._reports: deque[StepReport[K]] = deque()
        self._pause: asyncio.TimerHandle | None = None
        self._due = False  # whether a delivery is scheduled, at the latest when the pause ends
        self._due_now = False  # whether the event loop delivers without a pause

    def add(self, report: StepReport[K]) -> None:
        """Add a report; on any thread, but never twice at a time. While the loop is behind, they gather."""
        self._reports.append(report)
        # Appended before the tests, and taken after `_run` has cleared the flags: no report is left behind.
        if self._due and (self._due_now or not urgent(report)):
            return
        self._due = self._due_now = True
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._due = self._due_now = False
        reports = [self._reports.popleft() for _ in range(len(self._reports))]
        if not reports:
            return
        if self._seconds and self.pauses:
            self._due = True
            self._pause = self._loop.call_later(self._seconds, self._run)
        self._deliver(reports)


def urgent(report: StepReport[K]) -> bool:
    """Whether a report cannot wait: a sequence has ended, or its first token may be there.

    The first token of a sequence comes from a step that computed its prompt.
    """
    decoded_only = report.rows > 0 and report.tokens == report.decodes
    return not decoded_only or any(update.finish is not None for update in report.updates)
