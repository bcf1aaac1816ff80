"""Memory of ended requests is freed."""

from __future__ import annotations

import asyncio

from headrace import errors
from headrace.runtime.serving.limits import MIB
from headrace.runtime.serving.memory_reclaim import Reclaimer
from tests.harness import PATIENCE


async def test_frames_of_errors_are_freed_after_enough_bytes_were_released() -> None:
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
