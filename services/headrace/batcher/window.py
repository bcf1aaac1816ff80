"""Decide when a batch is complete, and what belongs to it.

A batch waits a little for company, because workers compute prompts that arrive together more cheaply
than one after the other; never while the worker has nothing else to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The bounds of a batch.

    size     most sequences
    tokens   most prompt tokens together; a single longer prompt still goes, alone
    linger   seconds that a batch waits for company after its first request arrived
    """

    size: int = 32
    tokens: int = 4096
    linger: float = 0.005

    def count(self, lengths: Iterable[int], room: int) -> int:
        """How many of the waiting, in order, make up the next batch.

        lengths   prompt tokens of each that waits
        room      how many sequences the worker takes now
        """
        total = taken = 0
        for length in lengths:
            if taken >= min(self.size, room) or (taken and total + length > self.tokens):
                break
            total += length
            taken += 1
        return taken

    def closes(self, lengths: Iterable[int], room: int, *, oldest: float, worker_idle: bool) -> float:
        """When the next batch is complete, on the clock of *oldest*; 0 is now.

        oldest        when the first of the waiting arrived
        worker_idle   whether the worker has nothing to do: then it is now
        """
        if worker_idle:
            return 0.0
        known = list(lengths)
        full = self.count(known, room) < len(known) or len(known) >= min(self.size, room)
        return 0.0 if full else oldest + self.linger
