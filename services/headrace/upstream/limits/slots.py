"""Limit the requests in flight at the upstream; further ones wait in the order of their arrival."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from opentelemetry import trace

from headrace import attributes, errors
from headrace.deadline import Deadline
from headrace.metrics import catalogue
from headrace.metrics.words import Outcome
from headrace.runtime.rate import RateMeter

_tracer = trace.get_tracer("headrace.upstream")
_STAGE = "upstream"  # in the metrics of queues
RETRY_SECONDS = (0.1, 30.0)  # the bounds of the delay that is advised when the queue is full


class Slots:
    """Slots for requests, and a queue for them.

    most    requests that may have a slot
    limit   requests that may wait
    """

    def __init__(self, most: int, limit: int, *, tier: str) -> None:
        self.most = most
        self.limit = limit
        self.taken = 0
        self._tier = tier
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._ended = RateMeter()
        self._depth = catalogue.QUEUE_DEPTH.of(tier=tier, stage=_STAGE)

    @property
    def queued(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    def oldest_wait(self, now: float) -> float:
        """Return how long the oldest request has waited, in seconds."""
        return now - self._waiting[0][0] if self._waiting else 0.0

    @asynccontextmanager
    async def held(self, deadline: Deadline) -> AsyncGenerator[None, None]:
        """Hold a slot while the block runs, after waiting for one until *deadline*.

        Raises Overloaded immediately if the queue is full, and DeadlineInQueue.
        """
        if self.taken < self.most:
            self.taken += 1
        else:
            await self._wait(deadline)
        try:
            yield
        finally:
            self._ended.add(time.monotonic())
            self._release()

    async def _wait(self, deadline: Deadline) -> None:
        """Wait for a slot that another request passes on."""
        now = time.monotonic()
        if len(self._waiting) >= self.limit:
            rate = self._ended.per_second(now)
            shortest, longest = RETRY_SECONDS
            delay = min(max((self.queued + 1) / rate if rate else 1.0, shortest), longest)
            raise errors.Overloaded(
                f"{self.taken} requests are in flight at the upstream and {self.queued} wait; retry after "
                f"{delay:.1f} s",
                retry_after=delay,
                queued=self.queued,
                limit=self.limit,
            )
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = now, slot
        self._waiting.append(entry)
        self._depth.add(1)
        outcome: Outcome = "cancelled"
        span = _tracer.start_span(attributes.SPAN_UPSTREAM_QUEUE)
        try:
            async with asyncio.timeout_at(deadline.timeout_at):
                await slot
            outcome = "ok"
        except TimeoutError:
            outcome = "deadline"
            raise errors.DeadlineInQueue(
                "the deadline passed before the upstream could be asked; nothing was generated"
            ) from None
        finally:
            self._depth.add(-1)
            catalogue.QUEUE_WAIT.of(tier=self._tier, stage=_STAGE, outcome=outcome).record(
                time.monotonic() - now
            )
            span.end()
            if outcome != "ok":
                if slot.done() and not slot.cancelled():  # it was passed on in the same moment
                    self._release()
                elif entry in self._waiting:
                    self._waiting.remove(entry)

    def _release(self) -> None:
        """Pass a slot on to the request that has waited longest, or free it."""
        while self._waiting:
            _, slot = self._waiting.popleft()
            if not slot.done():
                slot.set_result(None)
                return
        self.taken -= 1
