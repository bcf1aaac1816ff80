"""Services die under a client whose answers all share one stream, and none of them is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from tests.faults.fleet import Fleet
from tests.faults.secured import connect
from tests.faults.tally import Row, Streams, mixed, until_affected, visit

ANSWERS = 300


async def test_a_router_a_batcher_and_a_worker_are_killed_under_hundreds_of_answers(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row(f"SIGKILL of one of each, {ANSWERS} answers on one stream")
    async with connect(twins.target, multiplex=True) as client:
        for _ in until_affected(counted, ANSWERS // 3):
            await twins.heal()
            streams = Streams(client, mixed(rng, ANSWERS, min_tokens=60, max_tokens=120))
            await streams.streaming()
            victims = [
                await twins.busiest_router(),
                await twins.busiest_batcher(),
                twins.workers[rng.randrange(len(twins.workers))],
            ]
            for victim in rng.sample(victims, len(victims)):
                await victim.kill()
                await asyncio.sleep(rng.uniform(0.0, 0.5))
            counted.add(await streams.done())
        counted.add(await asyncio.gather(*(visit(client, one) for one in mixed(rng, 20))))

    counted.check()
    assert counted.moved >= ANSWERS // 3, "the kills affected answers"


async def test_the_only_router_restarts_under_hundreds_of_answers(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    """The client loses its stream and its connection, and has no other server to open the next one on."""
    counted = row(f"restart of the only router, {ANSWERS} answers on one stream")
    async with connect(twins.routers[0].address, multiplex=True, patience=180) as client:
        for _ in until_affected(counted, ANSWERS // 3):
            await twins.heal()
            streams = Streams(client, mixed(rng, ANSWERS, min_tokens=60, max_tokens=120))
            await streams.streaming()
            await twins.routers[0].kill()
            await twins.routers[0].start()
            counted.add(await streams.done())

    counted.check()
    assert counted.moved >= ANSWERS // 3, "the kill affected answers"
