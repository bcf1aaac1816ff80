"""A semaphore that serves its waiters fairly: keys take turns, however many waiters one key has."""

from __future__ import annotations

import asyncio
from collections import deque


class FairSemaphore:
    """A semaphore of *permits*. Keys with waiters are served round-robin, waiters of one key in order."""

    def __init__(self, permits: int) -> None:
        self._free = permits
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def acquire(self, key: str) -> Permit:
        """Wait for a permit on behalf of *key*."""
        if self._free:
            self._free -= 1
            return Permit(self)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # the permit was granted at the same moment
                self.release()
            raise
        return Permit(self)

    def acquire_free(self) -> Permit | None:
        """Return a permit if one is free; there are none while others wait."""
        if not self._free:
            return None
        self._free -= 1
        return Permit(self)

    def release(self) -> None:
        """Pass one permit to the key that was served least recently."""
        while self._waiting:
            key, queue = next(iter(self._waiting.items()))
            del self._waiting[key]
            waiter = queue.popleft()
            if queue:
                self._waiting[key] = queue  # at the end of the order
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1


class Permit:
    """A permit of a `FairSemaphore`. Calls of `release` after the first have no effect."""

    def __init__(self, semaphore: FairSemaphore) -> None:
        self._semaphore: FairSemaphore | None = semaphore

    def release(self) -> None:
        """Return the permit."""
        if self._semaphore is not None:
            self._semaphore.release()
            self._semaphore = None
