"""Decide when a batch is complete, and how large it may be, from what was measured.

A batch waits a little for company, because workers compute prompts that arrive together more cheaply
than one after the other; never while the worker has nothing to take in, never when nobody is expected,
and never past the engine step that is under way: what comes before its end joins the same next one.
"""

from __future__ import annotations

from dataclasses import dataclass

HORIZON_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The bounds of a batch.

    size     most sequences
    tokens   most prompt tokens that may wait at a worker; a single longer prompt still goes, alone
    linger   longest that a batch waits for company after its first request arrived, in seconds
    """

    size: int = 32
    tokens: int = 4096
    linger: float = 0.005

    def linger_for(self, *, arrivals: float, step_seconds: float) -> float:
        """How long waiting for company pays now.

        arrivals       requests per second, measured
        step_seconds   time of an engine step, measured; 0 while unknown
        """
        longest = min(self.linger, step_seconds) if step_seconds > 0 else self.linger
        if arrivals * longest < 1:
            return 0.0  # nobody would come
        return min(longest, self.size / arrivals)

    def budget(self, prefill_rate: float) -> int:
        """Prompt tokens that may wait at a worker: what it computes in half a second.

        More would only take the order out of our hands. *prefill_rate* is in tokens per second, 0 while
        unknown.
        """
        if prefill_rate <= 0:
            return self.tokens
        return max(min(int(prefill_rate * HORIZON_SECONDS), self.tokens), 1)

    def closes(
        self, waiting: int, tokens: int, room: int, *, oldest: float, linger: float, hungry: bool
    ) -> float:
        """When the next batch is complete, on the clock of *oldest*; 0 is now.

        waiting, tokens   how many wait, and their prompt tokens together
        room              how many sequences the workers take now
        oldest            when the first of the waiting arrived
        hungry            whether a worker has nothing to take in: then it is now
        """
        full = waiting >= min(self.size, room) or tokens >= self.tokens
        return 0.0 if hungry or full else oldest + linger
