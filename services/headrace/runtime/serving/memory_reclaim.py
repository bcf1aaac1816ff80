"""Return memory to the operating system after a burst of long requests."""

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
RECLAIM_BYTES = 8 * 1024 * 1024  # of ended requests, since the last reclaim
RECLAIM_SECONDS = 1.0  # from then until the reclaim
NEW_OBJECTS = 10_000  # between two collections of the newest objects; Python's default is 700


def return_large_blocks() -> None:
    """Configure glibc to return each block of `LARGE_BYTES` or more to the system when it is freed.

    By default glibc raises the threshold when such a block is freed for the first time, and keeps them from
    then on. Each large block costs page faults: use it in processes that hold text, not in those that
    compute. Without glibc it has no effect.
    """
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_ARENA_MAX, 2)


class Reclaimer:
    """Frees what ended requests leave behind: reference cycles, most of them of exceptions, and unused pages.

    Python starts a garbage collection by the number of objects, not by their size: a few exceptions whose
    frames hold long prompts may stay for minutes.
    """

    def __init__(self) -> None:
        self._released = 0
        self._due = False

    def released(self, size: int) -> None:
        """Count *size* bytes of an ended request."""
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


def freeze_loaded_objects() -> None:
    """Exclude all existing objects from later garbage collections: modules and settings are many and stay."""
    gc.collect()
    gc.freeze()


def collect_less_often() -> None:
    """Let more objects be made before Python looks for reference cycles among the newest.

    A message makes dozens of objects and no cycle: with Python's default, collections take up to a fifth of a
    service's time. `Reclaimer` frees what large requests leave behind.
    """
    gc.set_threshold(NEW_OBJECTS, 20, 20)


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
