"""Decide when a batch is complete and how many tokens may wait at a worker, from measurements.

A batch waits briefly for more requests, because workers compute prompts that arrive together at lower cost.
It does not wait while a worker has no prompt to compute, nor when no request is expected. It never waits
longer than the current engine step: requests that arrive before its end join the same next step.
"""

from __future__ import annotations

from dataclasses import dataclass

HORIZON_SECONDS = 0.5
# While a step is computed and the next one is scheduled, as vLLM does, prompts for a third must arrive.
STEPS_AHEAD = 3
UNKNOWN_TOKENS = 4096  # that may wait at a worker whose rate is unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The bounds of a batch.

    size     most sequences
    tokens   most prompt tokens that may wait at a worker; a single longer prompt is sent alone
    linger   the longest time that a batch waits after its first request arrived, in seconds
    """

    size: int = 32
    tokens: int = 16384
    linger: float = 0.005

    def linger_for(self, *, arrivals: float, step_seconds: float) -> float:
        """Return how long a batch should wait for more requests, in seconds.

        arrivals       requests per second, measured
        step_seconds   time of an engine step, measured; 0 while unknown
        """
        longest = min(self.linger, step_seconds) if step_seconds > 0 else self.linger
        if arrivals * longest < 1:
            return 0.0  # no request is expected in time
        return min(longest, self.size / arrivals)

    def budget(self, prefill_rate: float, step_tokens: int) -> int:
        """Return the prompt tokens that may wait at a worker: of half a second, or of three steps.

        A longer queue at the worker would undermine the order kept here.

        prefill_rate   tokens per second; 0 while unknown
        step_tokens    most tokens that one of its steps computes; 0 if unknown
        """
        soon = int(prefill_rate * HORIZON_SECONDS) if prefill_rate > 0 else UNKNOWN_TOKENS
        return max(min(max(soon, STEPS_AHEAD * step_tokens), self.tokens), 1)

    def is_complete(self, waiting: int, tokens: int, free_slots: int, *, idle: bool) -> bool:
        """Return whether a batch does not wait for more requests.

        waiting      the number of requests that wait
        tokens       the prompt tokens of those requests
        free_slots   the sequences that the workers accept now
        idle         whether a worker has no prompt to compute
        """
        return idle or waiting >= min(self.size, free_slots) or tokens >= self.tokens
