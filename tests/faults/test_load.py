"""Overload, cancellations and slow readers: the mesh rejects, frees resources and keeps serving."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

import pytest

from headrace.client import Client
from headrace.v1 import generation_pb2 as pb
from tests.faults.dice import expected
from tests.faults.fleet import Fleet, Plan
from tests.faults.secured import channel_with, connect
from tests.faults.tally import Row, Visit, mixed, request, visit

Fleets = Callable[[Plan], AbstractAsyncContextManager[Fleet]]

DEADLINES = ("DEADLINE", "DEADLINE_QUEUE", "DEADLINE_DECODE", "TTFT_UNATTAINABLE", "DEADLINE_UNATTAINABLE")
REFUSALS = ("QUEUE_FULL", "SHED")


async def test_a_storm_of_1000_cancels(twins: Fleet, row: Callable[[str], Row], rng: random.Random) -> None:
    counted = row("1000 callers hang up, 250 at a time")
    async with connect(twins.target) as client:
        for _ in range(4):
            visits = [
                visit(client, one, leaves_after=rng.randint(0, 6))
                for one in mixed(rng, 250, min_tokens=60, max_tokens=120)
            ]
            counted.add(await asyncio.gather(*visits))
        await twins.quiet()
        counted.add(await asyncio.gather(*(visit(client, one) for one in mixed(rng, 20))))

    counted.check()
    assert counted.outcomes["left"] > 900


async def test_cancel_finish_and_deadline_race(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    """Callers cancel at the last token and deadlines pass around the finish: each request has one outcome."""
    counted = row("cancel x finish x deadline, 300 races")
    async with connect(twins.target, retries=0) as client:
        began = time.monotonic()
        counted.add([await visit(client, one) for one in mixed(rng, 3, min_tokens=10, max_tokens=10)])
        usual = (time.monotonic() - began) / 3
        for _ in range(6):
            visits = []
            for one in mixed(rng, 50, min_tokens=10, max_tokens=10):
                leaves = rng.choice([None, None, 9, 10])
                visits.append(visit(client, one, leaves_after=leaves, timeout=usual * rng.uniform(0.5, 4)))
            counted.add(await asyncio.gather(*visits), may=DEADLINES)
        await twins.quiet()
        counted.add(await asyncio.gather(*(visit(client, one) for one in mixed(rng, 10))))

    counted.check()
    assert len(counted.outcomes) >= 3, "at least three kinds of outcomes occurred"


SMALL = Plan(
    workers=1,
    batchers=1,
    routers=1,
    worker_flags=("--engine", "echo", "--fake-step-seconds", "0.02", "--max-running", "8"),
    batcher_flags=("--fake", "--queue-limit", "32"),
)
SMALL_CAPACITY = 8 / 0.02  # tokens per second, if only steps took time
SMALL_PLACES = 8 + 32  # at the worker and in the queue
MOST_UNDER_WAY = 4 * SMALL_PLACES  # below the limits of a connection, which a slow machine would reach


async def test_overload_at_five_times_capacity(
    fleets: Fleets, row: Callable[[str], Row], rng: random.Random, long: bool
) -> None:
    """Excess requests are rejected immediately, admitted ones are served whole, and the queue is bounded."""
    seconds = 30.0 if long else 4.0
    counted = row(f"overload, five times capacity, {seconds:g} s")
    tokens = 25
    async with fleets(SMALL) as few, connect(few.target, retries=0) as client:

        def ask(number: int) -> pb.GenerateRequest:
            asked = request(rng, number, min_tokens=tokens, max_tokens=tokens)
            asked.sampling.ignore_eos = True
            del asked.sampling.stop[:]
            return asked

        # Measured capacity: as many callers as the worker has slots send one request after another.
        began = time.monotonic()
        full = await asyncio.gather(*(_in_turn(client, [ask(n) for n in range(4)]) for _ in range(8)))
        capacity = sum(one.tokens for visits in full for one in visits) / (time.monotonic() - began)
        memory = few.batchers[0].memory

        # Five times the theoretical capacity: on a busy machine the measured one may be too low for an
        # overload.
        pause = tokens / (5 * SMALL_CAPACITY)
        visits: list[asyncio.Task[Visit]] = []
        deepest = 0
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            under_way = sum(not one.done() for one in visits)
            for _ in range(min(int(now / pause) - len(visits), MOST_UNDER_WAY - under_way)):
                visits.append(asyncio.create_task(visit(client, ask(len(visits)))))
            deepest = max(deepest, (await few.loads())[0].queued)
            await asyncio.sleep(0.02)
        done = [one.result() for one in visits if one.done()]
        goodput = sum(one.tokens for one in done if one.whole) / (time.monotonic() - began)
        waiting = time.monotonic()
        counted.add(await asyncio.gather(*visits), may=REFUSALS)
        await few.quiet()
        recovery = time.monotonic() - waiting
        counted.add([await visit(client, ask(n)) for n in range(3)])
        grown = few.batchers[0].memory - memory

    share = goodput / capacity
    counted.notes.append(
        f"goodput {share:.0%} of capacity, queue at most {deepest} of 32, idle again after {recovery:.1f} s"
    )
    counted.check()
    refused = sum(counted.outcomes[reason] for reason in REFUSALS)
    assert refused > len(visits) / 3, "it was overload"
    assert deepest <= SMALL_PLACES, "the queue's limit, and what the worker has free slots for"
    assert grown < 64 * 1024 * 1024
    assert len(visits) - refused >= SMALL_PLACES, "an overloaded mesh still serves"


async def _in_turn(client: Client, asked: list[pb.GenerateRequest]) -> list[Visit]:
    return [await visit(client, one) for one in asked]


async def test_callers_that_do_not_read_do_not_block_others(
    fleets: Fleets, row: Callable[[str], Row], rng: random.Random
) -> None:
    """They have every slot of the only worker. If they kept them, no other request would end."""
    counted = row("8 callers do not read for a while, 24 others do")
    plan = Plan(
        workers=1,
        batchers=1,
        routers=1,
        worker_flags=("--engine", "echo", "--fake-step-seconds", "0.001", "--max-running", "8"),
        batcher_flags=(
            *("--fake", "--max-unread-tokens", "64", "--max-unread-seconds", "600"),
            *("--max-tokens", "3000"),
        ),
    )
    reads_on = asyncio.Event()
    # A channel with a small receive buffer; else it would hold much of an answer.
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with fleets(plan) as few, connect(few.batchers[0].address, retries=0) as client:
        channel = channel_with(few.batchers[0].address, narrow)
        async with Client(channel, retries=0) as slow:
            long = [request(rng, n, min_tokens=2500, max_tokens=3000) for n in range(8)]
            for one in long:
                one.sampling.ignore_eos = True
                del one.sampling.stop[:]
            judge = partial(expected, max_tokens=3000)
            reading = [
                asyncio.create_task(visit(slow, one, timeout=600, reads_on=reads_on, judge=judge))
                for one in long
            ]
            await _all_paused(few, len(long))
            counted.add(await asyncio.gather(*(visit(client, one) for one in mixed(rng, 24))))
            unread = await _all_paused(few, len(long))
            reads_on.set()
            counted.add(await asyncio.gather(*reading))
        await few.quiet()

    counted.check()
    assert max(unread) <= 64


async def _all_paused(few: Fleet, count: int) -> list[int]:
    """Wait until so many answers are paused and no others run. Returns the unread tokens of each."""
    async with asyncio.timeout(120):
        while True:
            state = (await few.batchers[0].inspect()).batcher
            if state.paused == state.in_flight == count:
                return [one.unread for one in state.sequences]
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("flood", [48])
async def test_a_flooding_tenant_does_not_block_a_quiet_one(
    fleets: Fleets, row: Callable[[str], Row], rng: random.Random, flood: int
) -> None:
    counted = row("one tenant floods, another asks now and then")
    plan = Plan(workers=1, batchers=1, routers=1, worker_flags=SMALL.worker_flags)
    finished = 0
    async with fleets(plan) as few, connect(few.target, retries=0) as client:

        def ask(number: int, tenant: str) -> pb.GenerateRequest:
            asked = request(rng, number, min_tokens=15, max_tokens=15)
            asked.sampling.ignore_eos = True
            asked.routing.tenant = tenant
            return asked

        async def keep_flooding() -> list[Visit]:
            nonlocal finished
            seen: list[Visit] = []
            while not enough.is_set():
                seen.append(await visit(client, ask(len(seen), "flood")))
                finished += 1
            return seen

        enough = asyncio.Event()
        floods = [asyncio.create_task(keep_flooding()) for _ in range(flood)]
        while finished < flood:
            await asyncio.sleep(0.01)
        quiet: list[Visit] = []
        overtaken_by: list[int] = []
        for number in range(6):
            before = finished
            quiet.append(await visit(client, ask(number, "quiet")))
            overtaken_by.append(finished - before)
        enough.set()
        counted.add(quiet)
        for seen in await asyncio.gather(*floods):
            counted.add(seen)

    typical = statistics.median(overtaken_by)
    counted.notes.append(
        f"{typical:g} of the flood end while a quiet request is served; {flood} are always there"
    )
    counted.check()
    assert typical < flood * 0.75, "with first come, first served all of them would end first"
