"""Batchers die and stall in mid-answer; the router carries on at another one, at the very next token."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable

from headrace.client import connect
from tests.faults.fleet import Fleet
from tests.faults.tally import Row, requests, visit


async def test_without_faults_the_reference_is_right(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    """Tells a wrong reference from a wrong answer."""
    counted = row("no fault")
    async with connect(twins.target) as client:
        counted.add(await asyncio.gather(*(visit(client, one) for one in requests(rng, 40))))

    counted.check()
    assert counted.moved == 0


async def test_a_batcher_that_is_killed_under_100_streams(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGKILL of a batcher, 100 streams")
    progress = [0] * 100

    def heard(number: int) -> Callable[[int], None]:
        def on_token(count: int) -> None:
            progress[number] = count

        return on_token

    async with connect(twins.target, retries=0) as client:
        asked = requests(rng, 100, min_tokens=60, max_tokens=120)
        visits = [
            asyncio.create_task(visit(client, one, on_token=heard(number), resume=False))
            for number, one in enumerate(asked)
        ]
        while sum(count > 0 for count in progress) < 20:
            await asyncio.sleep(0.005)
        await twins.batchers[0].kill()
        counted.add(await asyncio.gather(*visits))

    counted.check()
    assert counted.moved > 10, "the kill was felt"
    assert counted.replayed > 0


async def test_a_batcher_that_stops_answering_while_its_connections_stand(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGSTOP of a batcher, then SIGCONT")
    async with connect(twins.target, retries=0) as client:
        asked = requests(rng, 30, min_tokens=60, max_tokens=120)
        moving = asyncio.Event()
        visits = [
            asyncio.create_task(
                visit(client, one, on_token=lambda count: moving.set() if count > 5 else None, resume=False)
            )
            for one in asked
        ]
        await moving.wait()
        twins.batchers[1].send(signal.SIGSTOP)
        counted.add(await asyncio.gather(*visits))
        twins.batchers[1].send(signal.SIGCONT)
        await twins.batchers[1].ready()
        counted.add(await asyncio.gather(*(visit(client, one) for one in requests(rng, 10))))

    counted.check()
    assert counted.moved > 0, "the stop was felt"
