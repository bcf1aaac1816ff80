"""Let calls start in a fair order: a few at a time, connections taking turns.

A call has its turn from the moment it was admitted until it has its first response, or 0.1 s after its
message was read. Hundreds that one caller opens at once would all start in one turn of the event loop, and
everybody's next step would wait for that. Long messages start one by one: to parse, score and pass on each of
them takes milliseconds of the event loop.
Of messages that are not read core keeps 64 KiB at most.
"""

from __future__ import annotations

import asyncio
from collections import deque

TURNS = 32  # at the same time
LONG_BYTES = 128 * 1024  # of messages that start one by one


class Turns:
    """A semaphore of *count* turns whose waiters are served connection by connection."""

    def __init__(self, count: int = TURNS) -> None:
        self._free = count
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, connection: str) -> Turn:
        """Wait until a call of *connection* has its turn."""
        if self._free:
            self._free -= 1
            return Turn(self)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(connection, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given at the same moment
                self.give_back()
            raise
        return Turn(self)

    def give_back(self) -> None:
        """Pass a turn on: to the connection that has waited longest since its last one."""
        while self._waiting:
            connection, queue = next(iter(self._waiting.items()))
            del self._waiting[connection]
            turn = queue.popleft()
            if queue:
                self._waiting[connection] = queue  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Turn:
    """What `Turns.take` gives: end it once or more."""

    def __init__(self, turns: Turns) -> None:
        self._turns: Turns | None = turns

    def end(self) -> None:
        """Let the next call start."""
        if self._turns is not None:
            self._turns.give_back()
            self._turns = None
