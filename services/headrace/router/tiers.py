"""Know the tiers: where their batchers are, and what these last said of health, limits and load.

The async room of the router: one task per tier asks its batcher each second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Self

from headrace import errors
from headrace.client import Client, connect
from headrace.router.policy import TierView
from headrace.v1 import routing_service_pb2 as routing

log = logging.getLogger(__name__)


class Tier:
    """One tier and the client of its batcher.

    threshold   the lowest score that it is meant for
    """

    def __init__(self, name: str, target: str, threshold: float, client: Client) -> None:
        self.name = name
        self.target = target
        self.threshold = threshold
        self.client = client
        self.seen = routing.Tier(name=name, unhealthy_reason="not asked yet")

    @property
    def view(self) -> TierView:
        """What the policy needs to know."""
        seen = self.seen
        return TierView(self.name, self.threshold, seen.healthy, seen.model, seen.unhealthy_reason)

    async def look(self, timeout: float) -> None:
        """Ask the batcher how it is."""
        was = self.seen.healthy
        try:
            listed = await self.client.list_tiers(timeout=timeout)
            seen = routing.Tier()
            seen.CopyFrom(listed.tiers[0])
            seen.name = self.name
        except errors.HeadraceError as error:
            seen = routing.Tier(
                name=self.name, model=self.seen.model, unhealthy_reason=f"no answer from its batcher: {error}"
            )
            seen.limits.CopyFrom(self.seen.limits)
        self.seen = seen
        if was != seen.healthy:
            log.info(
                "tier health changed",
                extra={"tier": self.name, "healthy": seen.healthy, "reason": seen.unhealthy_reason},
            )


class Tiers:
    """All tiers, smallest first; use it as a context manager.

    targets        (name, batcher's gRPC target) pairs, smallest first
    thresholds     one per tier, ascending from 0
    poll_seconds   pause between looks at a healthy tier
    """

    def __init__(
        self, targets: Sequence[tuple[str, str]], thresholds: Sequence[float], *, poll_seconds: float = 1.0
    ) -> None:
        self._targets = list(zip(targets, thresholds, strict=True))
        self._poll_seconds = poll_seconds
        self._stack = AsyncExitStack()
        self.tiers: list[Tier] = []

    async def __aenter__(self) -> Self:
        for (name, target), threshold in self._targets:
            # The router decides where a second try goes, so the client makes none of its own.
            client = await self._stack.enter_async_context(connect(target, retries=0))
            self.tiers.append(Tier(name, target, threshold, client))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def __getitem__(self, name: str) -> Tier:
        return next(tier for tier in self.tiers if tier.name == name)

    @property
    def any_healthy(self) -> bool:
        """Whether there is anybody to send a request to."""
        return any(tier.seen.healthy for tier in self.tiers)

    def views(self) -> list[TierView]:
        """The tiers as the policy sees them."""
        return [tier.view for tier in self.tiers]

    async def watch(self) -> None:
        """Keep looking at every tier, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for tier in self.tiers:
                tasks.create_task(self._watch(tier))

    async def _watch(self, tier: Tier) -> None:
        while True:
            await tier.look(timeout=max(self._poll_seconds, 1.0))
            # What is down is looked at more often: somebody may be waiting for it.
            await asyncio.sleep(self._poll_seconds if tier.seen.healthy else min(self._poll_seconds, 0.25))
