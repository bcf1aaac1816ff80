"""Give memory back to the system when a burst of long requests is over."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# From malloc.h of glibc.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

LARGE_BYTES = 128 * 1024
RECLAIM_BYTES = 8 * 1024 * 1024  # of requests that have ended, since the last time
RECLAIM_SECONDS = 1.0


def give_back_large_blocks() -> None:
    """Have each block of `LARGE_BYTES` and more returned to the system when it is freed.

    That is glibc's way until such a block is freed for the first time; from then on it keeps them. Costs page
    faults for each large block: for processes that hold texts, not for those that compute. Nothing happens
    where there is no glibc.
    """
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_ARENA_MAX, 2)


class Reclaim:
    """Frees what ended requests have left: cycles, most of them of exceptions, and the allocator's pages.

    Python looks for cycles by the count of objects, not by their size: a few exceptions whose frames hold
    long prompts may stay for minutes.
    """

    def __init__(self) -> None:
        self._released = 0
        self._due = False

    def released(self, size: int) -> None:
        """A request of *size* bytes has ended."""
        self._released += size
        if self._released >= RECLAIM_BYTES and not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(RECLAIM_SECONDS, self._reclaim)

    def _reclaim(self) -> None:
        self._released = 0
        self._due = False
        gc.collect()
        if (trim := _glibc("malloc_trim")) is not None:
            trim(0)


def keep_what_is_loaded() -> None:
    """Leave what exists now out of later collections: modules and settings stay to the end, and are many."""
    gc.collect()
    gc.freeze()


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause garbage collection while the block imports or loads what stays, and exempt that afterwards.

    Collections take a fifth of the time of a large import, and find nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _glibc(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function
