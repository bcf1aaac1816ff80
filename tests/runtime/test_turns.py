"""Calls start in a fair order, all of them, a few at a time."""

from __future__ import annotations

import asyncio

from headrace.runtime.turns import TURNS, Turns


async def test_a_flood_of_one_connection_does_not_hold_up_another() -> None:
    turns, started, running = Turns(), list[str](), 0

    async def call(connection: str) -> None:
        nonlocal running
        turn = await turns.take(connection)
        started.append(connection)
        running += 1
        assert running <= TURNS
        await asyncio.sleep(0)
        running -= 1
        turn.end()
        turn.end()

    calls = [asyncio.create_task(call("flood")) for _ in range(1000)]
    calls.append(asyncio.create_task(call("honest")))
    await asyncio.gather(*calls)

    assert started.index("honest") <= 2 * TURNS
    assert len(started) == 1001
    assert turns._free == TURNS


async def test_calls_that_are_cancelled_while_they_wait_lose_no_turn() -> None:
    turns = Turns()

    async def call() -> None:
        (await turns.take("a")).end()

    held = [await turns.take("a") for _ in range(TURNS)]
    waiting = [asyncio.create_task(call()) for _ in range(100)]
    await asyncio.sleep(0)
    held[0].end()
    waiting[0].cancel()  # in the same moment as it is given its turn
    for task in waiting[1::2]:
        task.cancel()
    for turn in held[1:]:
        turn.end()
    await asyncio.wait(waiting, timeout=5)

    assert sum(task.cancelled() for task in waiting) == 51
    assert turns._free == TURNS
    assert not turns._waiting
