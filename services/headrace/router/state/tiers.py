"""Know the tiers: where their batchers are, and what these last said of health, limits and load.

The async room of the router: one task per batcher asks it each second, one per tier follows its
batchers' names. Who of a tier's batchers takes a request is decided here; which tier does, in `policy`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Self

from headrace import errors
from headrace.channel import open_channel
from headrace.client import Client
from headrace.router.answering import replies
from headrace.runtime.discovery import Discovery
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing

log = logging.getLogger(__name__)

HOPS = "headrace-hops"  # the header with the number of routers that a request has passed
MAX_HOPS = 4
OPEN_SECONDS = 5.0  # the longest that a router waits for the first looks before it opens its port
LOOK_SECONDS = 1.0  # the least that a batcher has to answer a look
# What a look may fail with because the batcher is busy; whatever else it replies, it is no batcher now.
_LATE = (errors.DeadlineExceeded, errors.RequestCancelled, errors.Overloaded)
HURRY_SECONDS = 0.25  # between looks at a batcher that is down: somebody may be waiting for it


class Stalled(Exception):
    """The batcher has been silent for too long, although its connection stands."""


class Batcher:
    """One batcher of a tier: its client, what it last said, and the answers that it is giving.

    A router may stand in a batcher's place: `router` says whether it does, `models` what it serves.

    stall_seconds   a batcher that answers no look and says nothing on any stream for so long is lost
    """

    def __init__(self, address: str, *, stall_seconds: float) -> None:
        self.address = address
        self.seen = routing.Tier(unhealthy_reason="not asked yet")
        self.models: frozenset[str] = frozenset()
        self.router = False
        self.suspect = False
        self.late = False
        self.live = 0
        self._live_then = 0
        self._stall_seconds = stall_seconds
        self._client = Client(open_channel(address, direct=True), retries=0)
        self._heard = time.monotonic()
        self._waits: set[asyncio.Timeout] = set()
        self._hurry = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether it takes requests, as far as is known."""
        return self.seen.healthy and not self.suspect

    @property
    def busy(self) -> int:
        """Requests that wait or run there: ours as of now, other routers' as of the last look."""
        load = self.seen.load
        return self.live + max(load.queued + load.running - self._live_then, 0)

    def doubt(self) -> None:
        """A stream of it broke: give it nothing before the next look, which is made at once."""
        self.suspect = True
        self._hurry.set()

    async def generate(
        self, request: pb.GenerateRequest, *, timeout: float, hops: int = 0, **labels: str | int
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Stream its answer. Raises what the client raises, and Stalled.

        hops     routers that the request has passed before this one
        labels   attributes of the call's span
        """
        self.live += 1
        metadata = {HOPS: str(hops + 1)} if self.router else None
        stream = self._client.generate(
            request, timeout=timeout, resume=False, labels=labels, metadata=metadata
        )
        try:
            async with aclosing(stream) as responses:
                while True:
                    try:
                        async with asyncio.timeout(None) as wait:
                            self._waits.add(wait)
                            try:
                                response = await anext(responses, None)
                            finally:
                                self._waits.discard(wait)
                    except TimeoutError:
                        raise Stalled(
                            f"the batcher at {self.address} has been silent for {self._stall_seconds:g} s"
                        ) from None
                    if response is None:
                        return
                    self._heard = time.monotonic()
                    yield response
        finally:
            self.live -= 1

    async def look(self, timeout: float) -> None:
        """Ask it how it is. Whatever it replies, only its health depends on it."""
        was = self.seen.healthy
        try:
            seen = replies.read_tiers(await self._client.list_tiers(timeout=timeout))
        except replies.BadReply as error:
            self.late = False
            self._heard = time.monotonic()
            self._fail(f"the batcher at {self.address} is not usable: {error}")
        except errors.HeadraceError as error:
            # A refused connection is no silence: a batcher that drains takes none and speaks on its streams.
            # And one late answer is no silence yet: the batcher may be busy.
            self.late = isinstance(error, _LATE)
            silent = self.late and time.monotonic() - self._heard > self._stall_seconds
            if silent:
                self._lose()
            if silent or not self.late:
                self._fail(f"no answer from the batcher at {self.address}: {error}")
        except Exception as error:
            log.error("look at a batcher failed", exc_info=error, extra={"batcher": self.address})
            self._fail(f"the batcher at {self.address} cannot be asked: {type(error).__name__}")
        else:
            self.seen, self.models, self.router = seen.tier, seen.models, seen.router
            self.late = False
            self._heard = time.monotonic()
            self._live_then = self.live
        self.suspect = False
        if was != self.seen.healthy:
            log.info(
                "batcher health changed",
                extra={
                    "batcher": self.address,
                    "healthy": self.seen.healthy,
                    "reason": self.seen.unhealthy_reason,
                },
            )

    async def pause(self, seconds: float) -> None:
        """Wait until the next look is due."""
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return
        finally:
            self._hurry.clear()

    async def close(self) -> None:
        """End all calls and close the channel."""
        await self._client.close()

    def _fail(self, reason: str) -> None:
        seen = routing.Tier(model=self.seen.model, unhealthy_reason=reason)
        seen.limits.CopyFrom(self.seen.limits)
        self.seen = seen

    def _lose(self) -> None:
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            wait.reschedule(now)


class Tier:
    """One tier and its batchers.

    targets     gRPC targets of its batchers; dns:/// names are resolved to one batcher per address
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
        self.seen = routing.Tier(name=name, unhealthy_reason="not asked yet")
        self.healthy_at = -math.inf  # time.monotonic() when it was last seen to be
        self._discovery = Discovery(targets)
        self._poll_seconds = poll_seconds
        self._stall_seconds = stall_seconds
        self._batchers: dict[str, Batcher] = {}
        self._changed = asyncio.Event()

    @property
    def models(self) -> frozenset[str]:
        """What its batchers serve, those that are healthy if any is."""
        ready = [batcher for batcher in self.batchers if batcher.seen.healthy]
        return frozenset().union(*(batcher.models for batcher in ready or self.batchers))

    @property
    def batchers(self) -> list[Batcher]:
        """Those that its targets name now."""
        return list(self._batchers.values())

    def pick(self, avoid: Collection[Batcher] = ()) -> Batcher | None:
        """The least busy batcher that is ready, rather one that answers its looks; None if there is none.

        avoid   not those
        """
        ready = [batcher for batcher in self._batchers.values() if batcher.ready and batcher not in avoid]
        return min(ready, key=lambda batcher: (batcher.late, batcher.busy, random.random()), default=None)

    async def picked(self, avoid: Collection[Batcher], seconds: float) -> Batcher | None:
        """Like `pick`, but waits up to *seconds* for a batcher to become ready."""
        try:
            async with asyncio.timeout(seconds):
                while (batcher := self.pick(avoid)) is None:
                    await self._changed.wait()
                return batcher
        except TimeoutError:
            return None

    async def settle(self) -> None:
        """Wait until each batcher in doubt has been looked at; milliseconds, unless it hangs."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                while any(batcher.suspect and batcher.seen.healthy for batcher in self.batchers):
                    await self._changed.wait()

    async def run(self, looked: asyncio.Event) -> None:
        """Keep looking at its batchers, those that its targets name from time to time, until cancelled.

        looked   set when each batcher of the first finding has been looked at
        """
        tasks: dict[str, asyncio.Task[None]] = {}
        first = True
        async with asyncio.TaskGroup() as group, aclosing(self._discovery.changes()) as changes:
            async for addresses in changes:
                for address in self._batchers.keys() - addresses:
                    # Streams that it still gives go on: it may be draining.
                    group.create_task(_retire(self._batchers.pop(address), tasks.pop(address)))
                came = [
                    Batcher(address, stall_seconds=self._stall_seconds)
                    for address in sorted(addresses - self._batchers.keys())
                ]
                await asyncio.gather(*(self._look(batcher) for batcher in came))
                for batcher in came:
                    self._batchers[batcher.address] = batcher
                    tasks[batcher.address] = group.create_task(self._watch(batcher))
                self._tell()
                if first:
                    first = False
                    looked.set()

    async def _watch(self, batcher: Batcher) -> None:
        try:
            while True:
                await batcher.pause(
                    self._poll_seconds if batcher.ready else min(self._poll_seconds, HURRY_SECONDS)
                )
                await self._look(batcher)
                self._tell()
        finally:
            await batcher.close()

    async def _look(self, batcher: Batcher) -> None:
        await batcher.look(max(self._poll_seconds, LOOK_SECONDS))

    def _tell(self) -> None:
        """Sum up what the batchers said, and wake who waits for one of them."""
        self.seen = summary(self.name, [batcher.seen for batcher in self._batchers.values()])
        if self.seen.healthy:
            self.healthy_at = time.monotonic()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _retire(batcher: Batcher, watching: asyncio.Task[None]) -> None:
    """Let a batcher's streams end, then stop looking at it."""
    while batcher.live:
        await asyncio.sleep(0.1)
    watching.cancel()


def summary(name: str, seen: Sequence[routing.Tier]) -> routing.Tier:
    """A tier as its batchers see it, together.

    They share the workers, so `workers` and `max_running` are the most that one of them knows; what waits,
    runs and is generated is each one's own, and adds up.
    """
    healthy = [one for one in seen if one.healthy]
    tier = routing.Tier(
        name=name,
        model=next((one.model for one in [*healthy, *seen] if one.model), ""),
        healthy=bool(healthy),
        unhealthy_reason=""
        if healthy
        else "; ".join(one.unhealthy_reason for one in seen) or "its targets have no address",
    )
    for one in healthy or seen:
        limits, load = one.limits, one.load
        tier.limits.context_length = (
            min(tier.limits.context_length, limits.context_length)
            if tier.limits.context_length
            else limits.context_length
        )
        tier.limits.max_tokens = max(tier.limits.max_tokens, limits.max_tokens)
        tier.limits.queue_limit = replies.total([tier.limits.queue_limit, limits.queue_limit])
        tier.limits.max_running = max(tier.limits.max_running, limits.max_running)
        tier.load.queued = replies.total([tier.load.queued, load.queued])
        tier.load.running = replies.total([tier.load.running, load.running])
        tier.load.workers = max(tier.load.workers, load.workers)
        tier.load.tokens_per_second += load.tokens_per_second
        if load.oldest_wait.ToNanoseconds() > tier.load.oldest_wait.ToNanoseconds():
            tier.load.oldest_wait.CopyFrom(load.oldest_wait)
    return tier


class Tiers:
    """All tiers, smallest first.

    targets         (name, its batchers' targets) pairs, smallest first
    poll_seconds    pause between looks at a healthy batcher
    stall_seconds   how long a batcher may be silent
    wait_seconds    how long a tier that has lost its last batcher or worker is waited for
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

    def __getitem__(self, name: str) -> Tier:
        return next(tier for tier in self.tiers if tier.name == name)

    @property
    def any_healthy(self) -> bool:
        """Whether there is anybody to send a request to."""
        return any(tier.seen.healthy for tier in self.tiers)

    async def returning(self, failed: Collection[str], began: float) -> bool:
        """Whether it is worth choosing anew, after a moment, although no tier would serve a request.

        failed  names of the tiers that were asked
        began   time.monotonic() at which the request began

        In a restart the last one of a tier may have gone before the router has heard that the first is back.
        A tier that has been gone for longer than that is not waited for.
        """
        now = time.monotonic()
        lately = any(
            now - tier.healthy_at < self._wait_seconds
            for tier in self.tiers
            if tier.name in failed or not tier.seen.healthy
        )
        if not lately or now - began >= self._wait_seconds:
            return False
        await asyncio.sleep(random.uniform(0.05, 0.15))
        return True

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[Self, None]:
        """Keep looking at every batcher while the block runs; entered when all were looked at once."""
        async with asyncio.TaskGroup() as group:
            looked = [asyncio.Event() for _ in self.tiers]
            runs = [
                group.create_task(tier.run(event)) for tier, event in zip(self.tiers, looked, strict=True)
            ]
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(OPEN_SECONDS):
                        for event in looked:
                            await event.wait()
                yield self
            finally:
                for run in runs:
                    run.cancel()
