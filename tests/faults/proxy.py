"""A TCP proxy between two services that simulates network faults."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress


class Proxy:
    """Forwards every connection to one address.

    delay   seconds by which data is delayed in both directions
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._to = (host, int(port))
        self._flows = asyncio.Event()
        self._flows.set()
        self._accepts = True
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.delay = 0.0
        self.port = 0

    @property
    def address(self) -> str:
        """The address on which it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._pairs)

    def freeze(self) -> None:
        """Forward no more data and keep connections open, as when a cable is pulled."""
        self._flows.clear()

    def thaw(self) -> None:
        """Forward data again, starting with what was held back."""
        self._flows.set()
        self._accepts = True

    def reset(self) -> None:
        """Reset all connections; new ones are accepted."""
        for pair in list(self._pairs):
            for writer in pair:
                raw = writer.get_extra_info("socket")
                with suppress(OSError, ValueError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

    def cut(self) -> None:
        """Partition the network: open connections hang, and new ones are reset."""
        self._flows.clear()
        self._accepts = False

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncGenerator[Proxy, None]:
        """Listen while the block runs."""
        server = await asyncio.start_server(self._connect, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self._accepts = False
            self.reset()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._accepts:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
        except OSError:
            writer.transport.abort()
            return
        if not self._accepts:  # any more
            writer.transport.abort()
            far_writer.transport.abort()
            return
        pair = (writer, far_writer)
        self._pairs.add(pair)
        tasks = {
            asyncio.create_task(self._pump(reader, far_writer)),
            asyncio.create_task(self._pump(far_reader, writer)),
        }
        self._tasks |= tasks
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks -= tasks
            self._pairs.discard(pair)
            for end in pair:
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
