"""Keys take turns, and permits are never lost."""

from __future__ import annotations

import asyncio

from headrace.runtime.serving.fair_semaphore import FairSemaphore

PERMITS = 32


async def test_a_flood_of_one_key_does_not_delay_another() -> None:
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


async def test_cancelled_waiters_lose_no_permit() -> None:
    semaphore = FairSemaphore(PERMITS)

    async def call() -> None:
        (await semaphore.acquire("a")).release()

    held = [await semaphore.acquire("a") for _ in range(PERMITS)]
    waiting = [asyncio.create_task(call()) for _ in range(100)]
    await asyncio.sleep(0)
    held[0].release()
    waiting[0].cancel()  # at the moment when it receives its permit
    for task in waiting[1::2]:
        task.cancel()
    for permit in held[1:]:
        permit.release()
    await asyncio.wait(waiting, timeout=5)

    assert sum(task.cancelled() for task in waiting) == 51
    assert semaphore._free == PERMITS
    assert not semaphore._waiting
