"""Gather tokens for chunks: each is one, or several if there are thousands per second.

A chunk costs this process and its client a system call each, many times as much as the event of the mesh that
it is made of. So tokens are gathered where they arrive: the client library reads the rule, see
`headrace.flushing`.
"""

from __future__ import annotations

import math
import time

from headrace.flushing import UPDATE_SECONDS, Flusher, chunk_tokens
from headrace.runtime.rate import RateMeter

WINDOW_SECONDS = 1.0


class Pace:
    """The rule by which tokens of all answers of a process are gathered.

    flusher   when they are handed over: the first one of an answer at once, none later than after 100 ms
    """

    def __init__(self) -> None:
        self.flusher = Flusher()
        self._rate = RateMeter(WINDOW_SECONDS)
        self._updated = -math.inf

    def count(self, tokens: int) -> None:
        """Count tokens of a chunk."""
        now = time.monotonic()
        self._rate.add(now, tokens)
        if now - self._updated >= UPDATE_SECONDS:
            self._updated = now
            self.flusher.tokens = chunk_tokens(self._rate.per_second(now))
