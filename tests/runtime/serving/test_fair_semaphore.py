"""Calls start in a fair order, all of them, a few at a time."""

from __future__ import annotations

import asyncio

from headrace.runtime.serving.fair_semaphore import FairSemaphore

PERMITS = 32


async def test_a_flood_of_one_connection_does_not_hold_up_another() -> None:
    semaphore, started, running = FairSemaphore(PERMITS), list[str](), 0

    async def call(connection: str) -> None:
        nonlocal running
        permit = await semaphore.acquire(connection)
        started.append(connection)
        running += 1
        assert running <= PERMITS
        await asyncio.sleep(0)
        running -= 1
        permit.release()
        permit.release()

    calls = [asyncio.create_task(call("flood")) for _ in range(1000)]
    calls.append(asyncio.create_task(call("honest")))
    await asyncio.gather(*calls)

    assert started.index("honest") <= 2 * PERMITS
    assert len(started) == 1001
    assert semaphore._free == PERMITS


async def test_calls_that_are_cancelled_while_they_wait_lose_no_turn() -> None:
    semaphore = FairSemaphore(PERMITS)

    async def call() -> None:
        (await semaphore.acquire("a")).release()

    held = [await semaphore.acquire("a") for _ in range(PERMITS)]
    waiting = [asyncio.create_task(call()) for _ in range(100)]
    await asyncio.sleep(0)
    held[0].release()
    waiting[0].cancel()  # in the same moment as it is given its turn
    for task in waiting[1::2]:
        task.cancel()
    for permit in held[1:]:
        permit.release()
    await asyncio.wait(waiting, timeout=5)

    assert sum(task.cancelled() for task in waiting) == 51
    assert semaphore._free == PERMITS
    assert not semaphore._waiting
