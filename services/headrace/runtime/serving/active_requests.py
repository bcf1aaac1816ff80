"""Track the requests in flight, so that a server can drain."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from headrace import errors


class ActiveRequests:
    """The requests in flight of one server. While it drains, new requests are rejected.

    drain_began   set when the server starts to drain
    """

    def __init__(self) -> None:
        self.drain_began = asyncio.Event()
        self._evicting = False
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def draining(self) -> bool:
        """Whether the server drains."""
        return self.drain_began.is_set()

    def drain(self) -> None:
        """Reject new requests from now on."""
        self.drain_began.set()

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return len(self._tasks)

    def evict(self) -> None:
        """End all requests in flight with DRAINING, so that their callers resume them on another server."""
        self._evicting = True
        for task in self._tasks:
            task.cancel()

    @contextmanager
    def track(self) -> Generator[None, None, None]:
        """Count the current task as a request in flight while the block runs.

        Raises Draining on entry while the server drains, and inside the block if the request is evicted.
        """
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._tasks.add(task)
        try:
            if self.draining:
                raise errors.Draining("the server is stopping; retry on another server", retry_after=0.2)
            yield
        except asyncio.CancelledError:
            if not self._evicting:
                raise
            task.uncancel()
            raise errors.Draining(
                "the server is stopping; resume on another server", retry_after=0.2
            ) from None
        finally:
            self._tasks.discard(task)
