"""Measure the process itself: the lag of its event loop, and its CPU time, memory and open files."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from headrace.metrics import catalogue

LAG_SECONDS = 0.5  # between two measurements

_STATM = Path("/proc/self/statm")
_OPEN_FILES = Path("/proc/self/fd")


@asynccontextmanager
async def measuring() -> AsyncGenerator[None, None]:
    """Measure this process while the block runs."""
    with ExitStack() as stack:
        stack.enter_context(catalogue.CPU_TIME.of().reading(time.process_time))
        if sys.platform == "linux":
            stack.enter_context(catalogue.MEMORY.of().reading(_resident_bytes))
            stack.enter_context(catalogue.OPEN_FILES.of().reading(_open_files))
        ticking = asyncio.create_task(_tick())
        try:
            yield
        finally:
            ticking.cancel()


async def _tick() -> None:
    lag = catalogue.EVENT_LOOP_LAG.of()
    while True:
        due = time.monotonic() + LAG_SECONDS  # the loop's own clock has milliseconds only
        await asyncio.sleep(LAG_SECONDS)
        lag.record(max(time.monotonic() - due, 0.0))


def _resident_bytes() -> float:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _open_files() -> float:
    return len(os.listdir(_OPEN_FILES))
