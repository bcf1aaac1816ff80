"""Routers die in mid-answer; the client library carries on, and the caller reads one stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from headrace.client import Client, connect
from tests.faults.fleet import Fleet, Plan
from tests.faults.tally import Row, Visit, requests, visit

Fleets = Callable[[Plan], AbstractAsyncContextManager[Fleet]]


class Streams:
    """Many answers under way at once, and how far they are."""

    def __init__(self, client: Client, rng: random.Random, count: int) -> None:
        self.count = count
        self._accepted: set[int] = set()
        self._speaking: set[int] = set()
        self._tasks = [
            asyncio.create_task(visit(client, asked, on_token=self._hear(number)))
            for number, asked in enumerate(requests(rng, count, min_tokens=60, max_tokens=120))
        ]

    def _hear(self, number: int) -> Callable[[int], None]:
        def hear(tokens: int) -> None:
            self._accepted.add(number)
            if tokens >= 5:
                self._speaking.add(number)

        return hear

    async def speaking(self) -> None:
        """Wait until all of them are accepted and a third have said something."""
        while len(self._accepted) < self.count or len(self._speaking) < self.count / 3:
            await asyncio.sleep(0.005)

    async def done(self) -> list[Visit]:
        """Wait until all have ended."""
        return await asyncio.gather(*self._tasks)


async def test_a_router_that_is_killed_while_another_stands_by(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGKILL of a router, another stands by")
    async with connect(twins.target) as client:
        streams = Streams(client, rng, 60)
        await streams.speaking()
        await twins.routers[0].kill()
        counted.add(await streams.done())
        counted.add(await asyncio.gather(*(visit(client, one) for one in requests(rng, 10))))

    counted.check()
    assert counted.moved >= 20, "the kill was felt"


async def test_the_only_router_is_killed_and_comes_back(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGKILL of the only router, restarted")
    async with connect(twins.routers[0].address) as client:
        streams = Streams(client, rng, 60)
        await streams.speaking()
        await twins.routers[0].kill()
        await twins.routers[0].start()
        counted.add(await streams.done())

    counted.check()
    assert counted.moved >= 20, "the kill was felt"


async def test_router_and_batcher_are_killed_one_after_the_other(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGKILL of a router and a batcher")
    async with connect(twins.target) as client:
        streams = Streams(client, rng, 60)
        await streams.speaking()
        await twins.routers[0].kill()
        await asyncio.sleep(rng.uniform(0.0, 0.3))
        await twins.batchers[rng.randrange(2)].kill()
        counted.add(await streams.done())

    counted.check()
    assert counted.moved >= 10, "the kills were felt"
