"""Memory of ended requests is freed."""

from __future__ import annotations

import asyncio

from headrace import errors
from headrace.runtime.memory_reclaim import Reclaimer
from headrace.runtime.serving.limits import MIB
from tests.harness import PATIENCE


async def test_frames_that_an_error_came_through_are_freed_once_much_has_been_released() -> None:
    class Long:
        alive = 0

        def __init__(self) -> None:
            Long.alive += 1

        def __del__(self) -> None:
            Long.alive -= 1

    def fail() -> None:
        text = Long()
        try:
            raise errors.InvalidRequest("no")
        except errors.InvalidRequest as error:
            kept = [error, text]
            kept.append(kept)

    fail()
    assert Long.alive == 1

    reclaimer = Reclaimer()
    for _ in range(9):
        reclaimer.released(MIB)
    async with asyncio.timeout(PATIENCE):
        while Long.alive:
            await asyncio.sleep(0.02)
