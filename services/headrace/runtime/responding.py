"""Let a streaming RPC end with a status at any moment, also while its first message is being written.

grpc.aio sends the initial metadata with the first message, and again with the status if that message is still
under way: gRPC's core refuses the second one, no status is ever sent, and the caller waits until its own
deadline. Here the initial metadata is an operation of its own, which a status waits for.
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn


class Responding:
    """A grpc.aio.ServicerContext whose `abort` always reaches the caller; all else is the context's own."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._begun: asyncio.Task[None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        """Send a message; one at a time."""
        if self._begun is None:
            self._begun = asyncio.ensure_future(self._context.send_initial_metadata(()))
            self._begun.add_done_callback(_seen)
        if not self._begun.done():
            await asyncio.shield(self._begun)  # whoever is cancelled here leaves it to `abort` to wait for
        await self._context.write(message)

    async def abort(self, *status: Any, **options: Any) -> NoReturn:
        """End the RPC with a status; see `grpc.aio.ServicerContext.abort`."""
        if self._begun is not None:
            await asyncio.wait([self._begun])  # it fails where the caller left, who needs no status
        await self._context.abort(*status, **options)
        raise AssertionError("abort returns by raising")


def _seen(begun: asyncio.Task[None]) -> None:
    """Take note of a failure: where nobody waits for it, asyncio would log it."""
    if not begun.cancelled():
        begun.exception()
