"""Routers die during answers; the client library resumes, and the caller reads one stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from tests.faults.fleet import START_SECONDS, Fleet
from tests.faults.secured import connect
from tests.faults.tally import Row, Streams, mixed, until_affected, visit


async def test_a_router_that_is_killed_while_another_stands_by(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGKILL of a router, another stands by")
    async with connect(twins.target) as client:
        for _ in until_affected(counted, 20):
            await twins.heal()
            streams = Streams(client, mixed(rng, 60, min_tokens=60, max_tokens=120))
            await streams.streaming()
            await (await twins.busiest_router()).kill()
            counted.add(await streams.done())
        counted.add(await asyncio.gather(*(visit(client, one) for one in mixed(rng, 10))))

    counted.check()
    assert counted.moved >= 20, "the kill affected answers"


async def test_the_only_router_is_killed_and_comes_back(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGKILL of the only router, restarted")
    async with connect(twins.routers[0].address, patience=START_SECONDS) as client:
        for _ in until_affected(counted, 20):
            await twins.heal()
            streams = Streams(client, mixed(rng, 60, min_tokens=60, max_tokens=120))
            await streams.streaming()
            await twins.routers[0].kill()
            await twins.routers[0].start()
            counted.add(await streams.done())

    counted.check()
    assert counted.moved >= 20, "the kill affected answers"


async def test_router_and_batcher_are_killed_one_after_the_other(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGKILL of a router and a batcher")
    async with connect(twins.target) as client:
        for _ in until_affected(counted, 10):
            await twins.heal()
            streams = Streams(client, mixed(rng, 60, min_tokens=60, max_tokens=120))
            await streams.streaming()
            await (await twins.busiest_router()).kill()
            await asyncio.sleep(rng.uniform(0.0, 0.3))
            await twins.batchers[rng.randrange(2)].kill()
            counted.add(await streams.done())

    counted.check()
    assert counted.moved >= 10, "the kills affected answers"
