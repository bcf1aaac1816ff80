"""Batchers die and stall during answers; the router resumes on another batcher at the next token."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable

from tests.faults.fleet import Fleet
from tests.faults.secured import connect
from tests.faults.tally import Row, Streams, mixed, until_affected, visit


async def test_without_faults_the_reference_is_right(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    """Distinguishes a wrong reference from a wrong answer."""
    counted = row("no fault")
    async with connect(twins.target) as client:
        counted.add(await asyncio.gather(*(visit(client, one) for one in mixed(rng, 40))))

    counted.check()
    assert counted.moved == 0


async def test_a_batcher_that_is_killed_under_100_streams(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGKILL of a batcher, 100 streams")
    async with connect(twins.target, retries=0) as client:
        for _ in until_affected(counted, 11):
            await twins.heal()
            streams = Streams(client, mixed(rng, 100, min_tokens=150, max_tokens=200), resume=False)
            await streams.accepted()
            victim = await twins.busiest_batcher()
            await streams.reached(10)
            await victim.kill()
            counted.add(await streams.done())

    counted.check()
    assert counted.moved > 10, "the kill affected answers"
    assert counted.replayed > 0


async def test_a_batcher_that_stalls_with_open_connections(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGSTOP of a batcher, then SIGCONT")
    async with connect(twins.target, retries=0) as client:
        for _ in until_affected(counted):
            await twins.heal()
            streams = Streams(client, mixed(rng, 30, min_tokens=60, max_tokens=120), resume=False)
            await streams.accepted()
            victim = await twins.busiest_batcher()
            await streams.reached(5)
            victim.send(signal.SIGSTOP)
            counted.add(await streams.done())
            victim.send(signal.SIGCONT)
            await victim.ready()
        counted.add(await asyncio.gather(*(visit(client, one) for one in mixed(rng, 10))))

    counted.check()
    assert counted.moved > 0, "the stop affected answers"
