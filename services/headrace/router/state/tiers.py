"""The tiers: which batchers serve each of them, and what these last reported of health, limits and load.

One task per batcher polls it, and one task per tier follows the addresses of its targets. `Tier.pick` chooses
the batcher of a tier; `headrace.routing.policy` chooses the tier.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Self

from headrace.deadline import Deadline
from headrace.metrics.catalogue import BATCHERS
from headrace.router.state.batcher_peer import BatcherPeer
from headrace.router.state.peer_reports import combined
from headrace.runtime.discovery import Discovery
from headrace.v1 import routing_service_pb2 as routing

FIRST_POLL_SECONDS = 5.0  # the longest that a router waits for the first polls before it opens its port
MIN_POLL_TIMEOUT = 1.0  # seconds; a longer pause between polls also allows more time for the reply
DOWN_POLL_SECONDS = 0.25  # the longest pause between polls of a batcher that is down: requests may be waiting


class Tier:
    """One tier and its batchers.

    reported     the reports of its batchers, combined
    models       the models of its healthy batchers, or of all batchers if none is healthy
    healthy_at   time.monotonic() at which it was last healthy

    targets      gRPC targets of its batchers; a dns:/// name resolves to one batcher per address
    """

    def __init__(
        self,
        name: str,
        targets: Sequence[str],
        *,
        poll_seconds: float = 1.0,
        stall_seconds: float = 5.0,
    ) -> None:
        self.name = name
        self.reported = routing.Tier(name=name, unhealthy_reason="not polled yet")
        self.models: frozenset[str] = frozenset()
        self.healthy_at = -math.inf
        self._discovery = Discovery(targets)
        self._poll_seconds = poll_seconds
        self._stall_seconds = stall_seconds
        self._batchers: dict[str, BatcherPeer] = {}
        self._changed = asyncio.Event()

    @property
    def batchers(self) -> list[BatcherPeer]:
        """The batchers at the current addresses of its targets."""
        return list(self._batchers.values())

    def pick(self, avoid: Collection[BatcherPeer] = ()) -> BatcherPeer | None:
        """Return the least busy ready batcher that is not in *avoid*; None if there is none.

        Batchers that reply to polls in time are preferred.
        """
        ready = [batcher for batcher in self._batchers.values() if batcher.ready and batcher not in avoid]
        if len(ready) == 1:
            return ready[0]
        return min(ready, key=lambda batcher: (batcher.late, batcher.busy, random.random()), default=None)

    async def wait_for_batcher(self, deadline: Deadline) -> BatcherPeer | None:
        """Like `pick`, but wait until *deadline* for a batcher to become ready."""
        try:
            async with asyncio.timeout_at(deadline.timeout_at):
                while (batcher := self.pick()) is None:
                    await self._changed.wait()
                return batcher
        except TimeoutError:
            return None

    async def settle(self) -> None:
        """Wait until each suspect batcher has been polled: milliseconds, unless it is stalled."""
        with suppress(TimeoutError):
            async with asyncio.timeout(MIN_POLL_TIMEOUT):
                while any(batcher.suspect and batcher.reported.healthy for batcher in self.batchers):
                    await self._changed.wait()

    async def run(self, polled: asyncio.Event) -> None:
        """Poll its batchers and follow the addresses of its targets, until cancelled.

        polled   set when each batcher of the first addresses has been polled
        """
        ready, waiting = (BATCHERS.of(tier=self.name, state=state) for state in ("ready", "not_ready"))
        with (
            ready.reading(lambda: sum(batcher.ready for batcher in self.batchers)),
            waiting.reading(lambda: sum(not batcher.ready for batcher in self.batchers)),
        ):
            await self._follow(polled)

    async def _follow(self, polled: asyncio.Event) -> None:
        tasks: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group, aclosing(self._discovery.changes()) as changes:
            async for addresses in changes:
                for address in self._batchers.keys() - addresses:
                    # Its streams continue: it may be draining.
                    group.create_task(_retire(self._batchers.pop(address), tasks.pop(address)))
                added = [
                    BatcherPeer(address, stall_seconds=self._stall_seconds)
                    for address in sorted(addresses - self._batchers.keys())
                ]
                await asyncio.gather(*(self._poll(batcher) for batcher in added))
                for batcher in added:
                    self._batchers[batcher.address] = batcher
                    tasks[batcher.address] = group.create_task(self._keep_polling(batcher))
                self._update()
                polled.set()

    async def _keep_polling(self, batcher: BatcherPeer) -> None:
        try:
            while True:
                await batcher.until_next_poll(
                    self._poll_seconds if batcher.ready else min(self._poll_seconds, DOWN_POLL_SECONDS)
                )
                await self._poll(batcher)
                self._update()
        finally:
            await batcher.close()

    async def _poll(self, batcher: BatcherPeer) -> None:
        await batcher.poll(max(self._poll_seconds, MIN_POLL_TIMEOUT))

    def _update(self) -> None:
        """Combine the batchers' reports, and resume the requests that wait for a batcher."""
        batchers = self.batchers
        self.reported = combined(self.name, [batcher.reported for batcher in batchers])
        healthy = [batcher for batcher in batchers if batcher.reported.healthy]
        self.models = frozenset().union(*(batcher.models for batcher in healthy or batchers))
        if self.reported.healthy:
            self.healthy_at = time.monotonic()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _retire(batcher: BatcherPeer, polling: asyncio.Task[None]) -> None:
    """Wait until a batcher's streams have ended, then stop polling it."""
    while batcher.in_flight:
        await asyncio.sleep(0.1)
    polling.cancel()


class Tiers:
    """All tiers, smallest first.

    targets         (name, its batchers' targets) pairs, smallest first
    poll_seconds    pause between polls of a healthy batcher
    stall_seconds   how long a batcher may send nothing before it is lost
    wait_seconds    how long a request waits for a tier that has just lost its last batcher or worker
    """

    def __init__(
        self,
        targets: Sequence[tuple[str, Sequence[str]]],
        *,
        poll_seconds: float = 1.0,
        stall_seconds: float = 5.0,
        wait_seconds: float = 3.0,
    ) -> None:
        self._wait_seconds = wait_seconds
        self.tiers = [
            Tier(name, addresses, poll_seconds=poll_seconds, stall_seconds=stall_seconds)
            for name, addresses in targets
        ]
        self._by_name = {tier.name: tier for tier in self.tiers}

    def __getitem__(self, name: str) -> Tier:
        return self._by_name[name]

    @property
    def any_healthy(self) -> bool:
        """Whether any tier can serve."""
        return any(tier.reported.healthy for tier in self.tiers)

    async def wait_for_recovery(self, failed: Collection[str], began: float) -> bool:
        """Wait a moment; return whether a tier may have recovered, so that choosing again makes sense.

        failed  names of the tiers that were tried
        began   time.monotonic() at which the request began

        In a rolling restart, the last batcher of a tier may stop before the router has polled the first new
        one. A tier that has been down for longer than that is not waited for.
        """
        now = time.monotonic()
        recent = any(
            now - tier.healthy_at < self._wait_seconds
            for tier in self.tiers
            if tier.name in failed or not tier.reported.healthy
        )
        if not recent or now - began >= self._wait_seconds:
            return False
        await asyncio.sleep(random.uniform(0.05, 0.15))
        return True

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[Self, None]:
        """Poll every batcher while the block runs. The block is entered when all were polled once."""
        async with asyncio.TaskGroup() as group:
            polled = [asyncio.Event() for _ in self.tiers]
            runs = [
                group.create_task(tier.run(event)) for tier, event in zip(self.tiers, polled, strict=True)
            ]
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(FIRST_POLL_SECONDS):
                        for event in polled:
                            await event.wait()
                yield self
            finally:
                for run in runs:
                    run.cancel()
