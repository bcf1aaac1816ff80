"""A short soak test: mixed traffic with occasional kills, and no resource grows."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable

import pytest

from headrace.client import Client
from headrace.v1 import admin_service_pb2 as admin
from tests.faults.fleet import Child, Fleet
from tests.faults.secured import connect
from tests.faults.tally import PATIENT_SECONDS, Row, Visit, request, visit
from tests.faults.test_load import DEADLINES

MEGABYTE = 1024 * 1024


@pytest.mark.timeout(1200)
async def test_nothing_grows(twins: Fleet, row: Callable[[str], Row], rng: random.Random, long: bool) -> None:
    """No process uses more than after the warm-up, and no request is left."""
    seconds = 600.0 if long else 12.0
    counted = row(f"soak, {seconds:g} s")
    steady = [*twins.routers, *twins.batchers, twins.workers[0]]
    async with connect(twins.target) as client:
        # The first half allocates what is allocated once.
        counted.add(await _traffic(client, rng, seconds / 2, twins.workers[1]), may=DEADLINES)
        await twins.heal()  # the stream to a restarted worker has tasks, too
        await twins.quiet()
        before = {child.name: (await child.inspect()).process_state for child in steady}
        counted.add(await _traffic(client, rng, seconds / 2, twins.workers[1]), may=DEADLINES)
        await twins.heal()
        await twins.quiet()
        await _nothing_left(twins)
        after = {child.name: (await child.inspect()).process_state for child in steady}

    grown = {
        what: max(getattr(after[name], what) - getattr(before[name], what) for name in before)
        for what in ("memory_bytes", "files", "threads", "tasks")
    }
    counted.notes.append(
        f"second half: at most {grown['memory_bytes'] / MEGABYTE:+.1f} MB, {grown['files']:+} file "
        f"descriptors, {grown['threads']:+} threads, {grown['tasks']:+} tasks; no request or handle left"
    )
    counted.check()
    assert grown["memory_bytes"] < 16 * MEGABYTE, (before, after)
    assert grown["files"] <= 8, (before, after)  # a new connection is two
    assert grown["threads"] <= 4, (before, after)
    assert grown["tasks"] <= 4, (before, after)  # a call in progress, a poll of a batcher


async def _nothing_left(fleet: Fleet) -> None:
    """Wait until no service has a request, a sequence or a handle."""
    left: dict[str, dict[str, int]] = {}
    try:
        async with asyncio.timeout(90):
            while True:
                states = {child.name: await child.inspect() for child in fleet.children}
                left = {name: found for name, state in states.items() if (found := _under_way(state))}
                if not left:
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"left behind: {left}") from None


def _under_way(state: admin.InspectResponse) -> dict[str, int]:
    counts = {
        "requests": state.process_state.requests,
        "live in the batcher": state.batcher.in_flight,
        "queued": sum(place.waiting for place in state.batcher.queue) + state.batcher.interrupted,
        "paused": state.batcher.paused,
        "handles": sum(worker.outstanding for worker in state.batcher.workers),
        "live in the worker": state.worker.in_flight,
        "unsent": sum(stream.pending for stream in state.worker.streams),
        "calls to batchers": sum(batcher.in_flight for batcher in state.router.batchers),
    }
    if state.HasField("worker"):  # streams of batchers that have ended
        counts["streams"] = max(len(state.worker.streams) - 2, 0)
    return {what: count for what, count in counts.items() if count}


async def _traffic(client: Client, rng: random.Random, seconds: float, victim: Child) -> list[Visit]:
    ends = time.monotonic() + seconds
    visits: list[Visit] = []

    async def call(number: int) -> None:
        while time.monotonic() < ends:
            leaves = rng.randint(0, 30) if rng.random() < 0.2 else None
            timeout = rng.uniform(0.05, 1.0) if rng.random() < 0.1 else PATIENT_SECONDS
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
