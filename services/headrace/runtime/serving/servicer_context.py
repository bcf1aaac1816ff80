"""Make `abort` of a streaming RPC reach the caller, even while the first message is being written.

grpc.aio sends the initial metadata with the first message. If a status is sent while that message is still in
progress, it sends the metadata again; gRPC's core rejects the second batch, no status is ever sent, and the
caller waits until its own deadline. The wrapper here sends the initial metadata as an operation of its own
and waits for it before a status.
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn


class StreamingContext:
    """A grpc.aio.ServicerContext whose `abort` always reaches the caller. Other methods are unchanged."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._metadata: asyncio.Task[None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        """Send a message; one at a time."""
        if self._metadata is None:
            self._metadata = asyncio.ensure_future(self._context.send_initial_metadata(()))
            self._metadata.add_done_callback(_retrieve)
        if not self._metadata.done():
            await asyncio.shield(self._metadata)  # after a cancellation `abort` waits for it
        await self._context.write(message)

    async def abort(self, *status: Any, **options: Any) -> NoReturn:
        """End the RPC with a status; see `grpc.aio.ServicerContext.abort`."""
        if self._metadata is not None:
            await asyncio.wait([self._metadata])  # it fails if the caller left, who needs no status
        await self._context.abort(*status, **options)
        raise AssertionError("abort returns by raising")


def _retrieve(metadata: asyncio.Task[None]) -> None:
    """Retrieve an exception that nobody awaits: asyncio would log it otherwise."""
    if not metadata.cancelled():
        metadata.exception()
