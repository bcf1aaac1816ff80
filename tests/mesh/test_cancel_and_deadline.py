"""A request that its caller abandoned uses no more resources, whatever stage it is in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest

from headrace import deadline, errors
from headrace.batcher.waiting.estimates import Estimates
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import Mesh, collect, eventually, prompt, running_mesh

LONG = 3000


@pytest.fixture
async def slow() -> AsyncGenerator[Mesh, None]:
    """Run one tier with two sequences at a time, steps of 20 ms, and 8 prompt tokens a step."""
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(max_running=2, step_seconds=0.02),
        worker_settings={"step_tokens": 8},
        batcher_settings={"max_tokens": LONG},
    ) as running:
        yield running


def endless(text: str = "x") -> pb.GenerateRequest:
    return prompt(text, max_tokens=LONG, ignore_eos=True)


async def test_cancelling_during_decode_frees_the_sequence(slow: Mesh, count: Callable[..., float]) -> None:
    before = count("headrace.sequences.ended", outcome="cancelled")
    async with aclosing(slow.client.generate(endless(), timeout=600)) as stream:
        async for response in stream:
            if response.HasField("delta"):
                break

    await eventually(lambda: not slow.left_behind)
    assert count("headrace.sequences.ended", outcome="cancelled") == before + 1
    assert count("headrace.requests", outcome="cancelled") >= 1


async def test_cancelling_during_prefill_frees_the_sequence(slow: Mesh) -> None:
    only = slow.tiers["only"]
    async with aclosing(slow.client.generate(prompt("p" * 2000), timeout=600)) as stream:
        await anext(stream)
        await eventually(lambda: only.worker.streams.load().running == 1)

    await eventually(lambda: not slow.left_behind)


async def test_cancelling_in_the_queue_frees_the_slot(slow: Mesh) -> None:
    coalescer = slow.tiers["only"].batcher.coalescer
    async with asyncio.TaskGroup() as tasks:
        readers = [tasks.create_task(collect(slow.client, endless(), timeout=600)) for _ in range(6)]
        await eventually(lambda: len(coalescer.queue) == 2)  # 2 run, 2 wait at the worker
        for reader in readers:
            reader.cancel()

    await eventually(lambda: not slow.left_behind)


async def test_a_deadline_during_decode_is_reported_and_frees_the_sequence(slow: Mesh) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        # Few tokens: a request for many would be rejected immediately, as the pace is known.
        await collect(slow.client, prompt("y" * 100), timeout=0.5)

    await eventually(lambda: not slow.left_behind)


async def test_a_deadline_in_the_queue_has_its_own_reason(
    slow: Mesh, count: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = count("headrace.requests", error="DEADLINE_QUEUE")
    coalescer = slow.tiers["only"].batcher.coalescer
    # The batcher answers 57 s before the deadline, so that only it can report the deadline, even on a busy
    # machine. Its admission ignores what was measured in those three seconds.
    monkeypatch.setattr(deadline, "DEADLINE_MARGIN", 57.0)
    monkeypatch.setattr(coalescer.admission, "estimates", lambda now: Estimates())
    async with asyncio.TaskGroup() as tasks:
        readers = [tasks.create_task(collect(slow.client, endless(), timeout=600)) for _ in range(4)]
        await eventually(lambda: slow.tiers["only"].worker.streams.in_flight == 4)
        with pytest.raises(errors.DeadlineExceeded):
            await collect(slow.client, prompt("late"), timeout=60.0)
        await eventually(lambda: len(coalescer.queue) == 0)
        for reader in readers:
            reader.cancel()

    await eventually(lambda: not slow.left_behind)
    assert count("headrace.requests", error="DEADLINE_QUEUE") == before + 2, "of batcher and router"


async def test_a_request_without_a_deadline_gets_the_routers_default() -> None:
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(step_seconds=0.02),
        router_settings={"default_deadline": 0.4},
    ) as mesh:
        with pytest.raises(errors.DeadlineExceeded):
            await collect(mesh.client, endless(), timeout=None)

        await eventually(lambda: not mesh.left_behind)


async def test_other_sequences_of_a_batch_finish_when_one_is_cancelled(slow: Mesh) -> None:
    async with asyncio.TaskGroup() as tasks:
        leaving = tasks.create_task(collect(slow.client, endless("leaves"), timeout=600))
        staying = tasks.create_task(collect(slow.client, prompt("stays " * 5)))
        await eventually(lambda: slow.tiers["only"].worker.streams.in_flight == 2)
        leaving.cancel()

    assert (await staying).text == "stays " * 5
