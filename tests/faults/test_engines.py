"""Engines fail for one sequence, or for a while: other sequences are unaffected, and the breaker opens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

from tests.faults.fleet import Fleet, Plan
from tests.faults.secured import connect
from tests.faults.tally import Row, mixed, visit

Fleets = Callable[[Plan], AbstractAsyncContextManager[Fleet]]

PLAN = Plan(workers=2, batchers=1, routers=1)


async def test_a_row_that_cannot_be_sampled_affects_no_other(
    fleets: Fleets, row: Callable[[str], Row], rng: random.Random
) -> None:
    """The sequence is retried on another worker. It fails only if it meets a second such row there."""
    counted = row("every 89th row of each worker is NaN")
    faulty = replace(PLAN, worker_flags=(*PLAN.worker_flags, "--faults", "nan_row=89"))
    async with fleets(faulty) as few, connect(few.target, retries=0) as client:
        asked = mixed(rng, 60, min_tokens=20, max_tokens=30)
        visits = await asyncio.gather(*(visit(client, one) for one in asked))
        counted.add(visits, may=["SEQUENCE_FAULT"])
        await few.quiet()

    counted.check()
    assert counted.moved > 3, "the faults affected answers"
    assert counted.outcomes["SEQUENCE_FAULT"] < counted.moved, "most of them were hidden"


async def test_a_worker_whose_device_breaks_exits_and_its_answers_continue_elsewhere(
    fleets: Fleets, row: Callable[[str], Row], rng: random.Random
) -> None:
    """Every later step of it would fail. Two steps are in flight when it breaks."""
    counted = row("the device of a worker breaks under load")
    async with (
        fleets(replace(PLAN, worker_module="tests.faults.device_worker")) as few,
        connect(few.target, retries=0) as client,
    ):
        bad = few.workers[1]
        bad.flags = [*bad.flags, "--faults", "break_device_after_tokens=400"]
        await bad.kill()
        await few.heal()
        asked = mixed(rng, 40, min_tokens=40, max_tokens=60)
        counted.add(await asyncio.gather(*(visit(client, one) for one in asked)))
        code = await bad.gone()

    counted.check()
    assert counted.moved > 0, "the fault affected answers"
    assert code == 1
    assert "the device failed" in bad.tail()


async def test_the_breaker_of_a_failing_engine_opens_and_probes_with_one_request(
    fleets: Fleets, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("an engine raises in each step, later no more")
    async with fleets(PLAN) as few, connect(few.target, retries=0) as client:
        bad = few.workers[1]
        flags = bad.flags
        bad.flags = [*flags, "--faults", "raise_step=1"]
        await bad.kill()
        await few.heal()

        async def breaker() -> str:
            workers = (await few.batchers[0].inspect()).batcher.workers
            return next(worker.breaker for worker in workers if worker.target == bad.address)

        async def ask_until(state: str) -> None:
            async with asyncio.timeout(240):
                while True:
                    asked = mixed(rng, 12, min_tokens=5, max_tokens=10)
                    counted.add(await asyncio.gather(*(visit(client, one) for one in asked)))
                    if await breaker() == state:
                        return

        async def half_open() -> None:
            """Without requests there is none to probe with."""
            async with asyncio.timeout(240):
                while await breaker() != "half open":
                    await asyncio.sleep(0.05)

        await ask_until("open")
        await half_open()
        await ask_until("open")
        bad.flags = flags
        await bad.kill()
        await few.heal()
        await half_open()
        await ask_until("closed")

    counted.check()
    assert counted.moved > 0, "the faults affected answers"
