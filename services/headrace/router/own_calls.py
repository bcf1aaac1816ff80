"""Gather tokens for callers whose answers are calls of their own, where each event is a message.

A message costs a hundred times as much as an event on a shared stream. So the router gathers tokens where the
messages are made, by the load of this hop; the batchers send it each token.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from headrace.flushing import Flusher, LiveFlushing
from headrace.multiplex.serving import Write
from headrace.runtime.rate import RateMeter
from headrace.v1 import generation_pb2 as pb


class OwnCalls:
    """The calls of Generate in flight, and the rule by which their tokens are gathered."""

    def __init__(self) -> None:
        self._calls = 0
        self._rate = RateMeter()
        self._flushing = LiveFlushing()

    @property
    def flusher(self) -> Flusher:
        """When gathered tokens are sent to callers that did not choose it."""
        return self._flushing.messages

    @contextmanager
    def counted(self, write: Write) -> Generator[Write, None, None]:
        """Count a call while the block runs. Yields *write*, which counts the tokens."""

        async def counting(response: pb.GenerateResponse) -> None:
            await write(response)
            if response.HasField("delta"):
                now = time.monotonic()
                self._rate.add(now, response.delta.token_count)
                self._update(now)

        self._calls += 1
        self._update(time.monotonic())
        try:
            yield counting
        finally:
            self._calls -= 1

    def _update(self, now: float) -> None:
        if self._flushing.is_due(now):
            self._flushing.update(now, streams=self._calls, tokens_per_second=self._rate.per_second(now))
