"""Workers die, stall and restart; the batcher resumes on another worker at the next token."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from headrace.v1 import generation_pb2 as pb
from tests.faults.fleet import Fleet, Plan
from tests.faults.secured import connect
from tests.faults.tally import Row, Streams, mixed, request, until_affected, visit

TOKENS = 40


def exactly(rng: random.Random, number: int, tokens: int = TOKENS, **limits: int) -> pb.GenerateRequest:
    """Return a request whose answer has exactly so many tokens."""
    asked = request(rng, number, min_tokens=tokens, max_tokens=tokens, **limits)
    asked.sampling.ignore_eos = True
    del asked.sampling.stop[:]
    return asked


@pytest.mark.parametrize("stage", ["queued", "prefill", "first", "middle", "last", "finished"])
async def test_a_worker_that_is_killed(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random, stage: str
) -> None:
    """Both workers in turn: only the batchers know which one has the work at the first token."""
    counted = row(f"SIGKILL of a worker: {stage}")
    # A worker runs 16 at a time: 24 use both, and of 80 most are queued. 3000 prompt tokens take 24 steps.
    asked = [exactly(rng, number) for number in range(80 if stage == "queued" else 24)]
    if stage == "prefill":
        for one in asked:
            one.prompt += "x" * 3000
    felt = stage in ("queued", "prefill", "first", "middle")
    async with connect(twins.target, retries=0) as client:
        for _ in until_affected(counted, 1 if felt else 0):
            for victim in twins.workers:
                streams = Streams(client, asked)
                if stage == "prefill":
                    await streams.accepted()
                elif stage == "finished":
                    counted.add(await streams.done())
                else:
                    await streams.reached({"middle": TOKENS // 2, "last": TOKENS - 1}.get(stage, 1))
                await victim.kill()
                if stage != "finished":
                    counted.add(await streams.done())
                after = [exactly(rng, number) for number in range(4)]
                counted.add(await asyncio.gather(*(visit(client, one) for one in after)))
                await twins.heal()

    counted.check()
    if felt:
        assert counted.moved > 0, "the kills affected answers"


async def test_both_workers_are_killed_one_after_the_other(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("SIGKILL of both workers in turn")
    async with connect(twins.target, retries=0) as client:
        for _ in until_affected(counted):
            await twins.heal()
            streams = Streams(client, [exactly(rng, number, 300) for number in range(12)])
            await streams.reached(30)
            await twins.workers[0].kill()
            await twins.heal()
            await twins.workers[1].kill()
            counted.add(await streams.done())

    counted.check()
    assert counted.moved > 0, "the kills affected answers"


async def test_a_worker_that_stalls_with_open_connections(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    """When it continues, its late frames belong to former attempts and must be ignored."""
    counted = row("SIGSTOP of a worker, then SIGCONT")
    async with connect(twins.target, retries=0) as client:
        for _ in until_affected(counted):
            await twins.heal()
            streams = Streams(client, [exactly(rng, number, 200) for number in range(24)])
            await streams.reached(20)
            twins.workers[0].send(signal.SIGSTOP)
            counted.add(await streams.done())
            again = Streams(client, [exactly(rng, number, 100) for number in range(24)])
            await again.accepted()
            twins.workers[0].send(signal.SIGCONT)
            counted.add(await again.done())

    counted.check()
    assert counted.moved > 0, "the stop affected answers"


async def test_all_workers_die_and_restart(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("all workers killed, later restarted")
    async with connect(twins.target, retries=0) as client:
        streams = Streams(client, [exactly(rng, number, 100) for number in range(16)], resume=False)
        await streams.begun()  # one that loses two workers before its first token counts as poison
        await asyncio.gather(*(worker.kill() for worker in twins.workers))
        # Without workers, requests are rejected immediately, with a retry delay.
        refused = [await visit(client, one) for one in mixed(rng, 4)]
        await asyncio.gather(*(worker.restart() for worker in twins.workers))
        counted.add(refused, may=["NO_WORKERS", "WORKER_LOST"])  # the batcher may not have noticed yet
        counted.add(await streams.done(), may=["NO_WORKERS", "WORKER_LOST"])
        await twins.heal()
        back = await asyncio.gather(*(visit(client, one) for one in mixed(rng, 16)))
        counted.add(back)

    counted.check()
    assert all(one.whole for one in back)


async def test_a_prompt_that_kills_its_workers_is_rejected_after_two(
    fleets: Callable[[Plan], AbstractAsyncContextManager[Fleet]],
    row: Callable[[str], Row],
    rng: random.Random,
) -> None:
    counted = row("a prompt that kills its worker, three workers")
    async with fleets(Plan(workers=3, batchers=1, routers=1)) as few:
        async with connect(few.target) as client:
            streams = Streams(client, [exactly(rng, number, 250) for number in range(12)])
            await streams.reached(20)
            poison = pb.GenerateRequest(prompt="POISON", sampling=pb.Sampling(max_tokens=9))
            poisoned = await visit(client, poison)
            counted.add([poisoned], may=["POISON_REQUEST"])
            counted.add(await streams.done())
            counted.add([await visit(client, exactly(rng, 99))])
        dead = [worker for worker in few.workers if not worker.alive]

    counted.check()
    assert poisoned.outcome == "POISON_REQUEST"
    assert len(dead) == 2
