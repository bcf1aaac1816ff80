"""Calls that are made frame by frame, as no client library sends them."""

from __future__ import annotations

from tests.harness import PATIENCE, prompt
from tests.hostile.wire import headers, message, peer

VALID = message(prompt("x").SerializeToString())


async def status(port: int, path: bytes | str, body: bytes | None, *more: tuple[str, str]) -> str:
    """Make one call and return how it ends."""
    async with peer(port) as one:
        stream = await one.call(headers(path, *more), body)
        await one.answered([stream], seconds=PATIENCE)
        return one.outcome(stream)
