"""Run an event loop on a thread of its own, so that vLLM's work between two steps delays no stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop on a daemon thread that runs until `stop`.

    The processes that are started on it end with the thread, see `lifetime`.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop."""
        return self._loop

    def run(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """Run a coroutine on the loop and return its result; blocks. Raises TimeoutError after *seconds*."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function on the loop soon, in the order of the calls. Does nothing once it has stopped."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def stop(self, seconds: float) -> bool:
        """Stop the loop and wait at most *seconds*. Returns whether the thread has ended."""
        self.call(self._loop.stop)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            _cancel_all(self._loop)
            self._loop.close()


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=1))
