"""Hours in small: mixed traffic, a kill now and then, and nothing grows."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable

import pytest

from headrace.client import Client, connect
from tests.faults.fleet import Child, Fleet
from tests.faults.tally import Row, Visit, request, visit
from tests.faults.test_load import DEADLINES

MEGABYTE = 1024 * 1024


@pytest.mark.timeout(1200)
async def test_nothing_grows(twins: Fleet, row: Callable[[str], Row], rng: random.Random, long: bool) -> None:
    """Memory, file descriptors and threads of every process are what they were after the warm-up."""
    seconds = 600.0 if long else 20.0
    counted = row(f"soak, {seconds:g} s")
    steady = [*twins.routers, *twins.batchers, twins.workers[0]]
    async with connect(twins.target) as client:
        # What is allocated once, at the first of its kind, is there when half of the time is over.
        counted.add(await _traffic(client, rng, seconds / 2, twins.workers[1]), may=DEADLINES)
        await twins.quiet()
        before = {child.name: _size(child) for child in steady}
        counted.add(await _traffic(client, rng, seconds / 2, twins.workers[1]), may=DEADLINES)
        await twins.quiet()
        after = {child.name: _size(child) for child in steady}

    grown = max(after[name][0] - before[name][0] for name in before)
    files = max(after[name][1] - before[name][1] for name in before)
    threads = max(after[name][2] - before[name][2] for name in before)
    counted.notes.append(
        f"second half: at most {grown / MEGABYTE:+.1f} MB, {files:+} file descriptors, {threads:+} threads"
    )
    counted.check()
    assert grown < 16 * MEGABYTE, (before, after)
    assert files <= 8, (before, after)  # a connection that is being made anew is two
    assert threads <= 4, (before, after)


async def _traffic(client: Client, rng: random.Random, seconds: float, victim: Child) -> list[Visit]:
    ends = time.monotonic() + seconds
    visits: list[Visit] = []

    async def call(number: int) -> None:
        while time.monotonic() < ends:
            leaves = rng.randint(0, 30) if rng.random() < 0.2 else None
            timeout = rng.uniform(0.05, 1.0) if rng.random() < 0.1 else 60.0
            asked = request(rng, number, min_tokens=1, max_tokens=80, prompt_tokens=300)
            visits.append(await visit(client, asked, leaves_after=leaves, timeout=timeout))

    async def kill() -> None:
        while time.monotonic() < ends - 3:
            await asyncio.sleep(rng.uniform(2, 6))
            victim.send(signal.SIGKILL)
            await victim.gone()
            await victim.restart()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(kill())
        for number in range(24):
            tasks.create_task(call(number))
    return visits


def _size(child: Child) -> tuple[int, int, int]:
    return child.memory, child.files, child.threads
