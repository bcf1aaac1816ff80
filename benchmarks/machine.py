"""Describe the machine and measure its load: CPU used by other processes, memory of process trees.

A measurement is valid only on a quiet machine: `Window` measures how much CPU went to processes that do not
take part. The source is Linux's /proc; on other systems `others` is unknown and 0.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

QUIET = 0.10  # cores that other processes may use during a clean run
_STAT = Path("/proc/stat")


def describe() -> dict[str, object]:
    """Describe the machine, to be recorded with its figures."""
    cpu, flags = platform.processor() or platform.machine(), set[str]()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
    return {
        "cpu": cpu,
        "cores": cores(),
        "features": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of packages, without those that are not installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def tree(roots: Iterable[int]) -> list[psutil.Process]:
    """Return the processes of these ids and all their descendants, each once."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        with suppress(psutil.Error):
            process = psutil.Process(root)
            for each in (process, *process.children(recursive=True)):
                found[each.pid] = each
    return list(found.values())


def resident(roots: Iterable[int]) -> int:
    """Return bytes of resident memory of process trees; a page that processes share counts once in all.

    On systems other than Linux, it counts for each process.
    """
    total = 0
    for process in tree(roots):
        with suppress(psutil.Error):
            total += _proportional(process.pid) or process.memory_info().rss
    return total


def _proportional(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 if it is unknown."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def cpu_seconds(roots: Iterable[int]) -> float:
    """Return the CPU time that process trees have used, including their ended children."""
    total = 0.0
    for process in tree(roots):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
            total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


def busy_seconds() -> float | None:
    """Return the CPU time that all processes of the machine have used; None if unknown."""
    if not _STAT.exists():
        return None
    fields = [int(part) for part in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


@dataclass
class Window:
    """Measures the cores used between opening and closing, by us and by others.

    roots    process trees that take part, besides this process
    """

    roots: Sequence[int]
    own: float = 0.0
    others: float = 0.0
    peak_bytes: int = 0
    _began: float = field(default=0.0, repr=False)
    _busy: float | None = field(default=None, repr=False)
    _cpu: float = field(default=0.0, repr=False)

    @property
    def clean(self) -> bool:
        """Whether other processes were quiet."""
        return self.others <= QUIET

    def open(self) -> None:
        """Start the window."""
        self._cpu, self._busy = cpu_seconds(self._all), busy_seconds()
        self._began = time.perf_counter()

    def close(self) -> None:
        """End the window and compute the cores used."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        busy, own = busy_seconds(), cpu_seconds(self._all) - self._cpu
        self.own = own / seconds
        if busy is not None and self._busy is not None:
            self.others = max(0.0, (busy - self._busy - own) / seconds)

    @property
    def _all(self) -> set[int]:
        return {os.getpid(), *self.roots}


@asynccontextmanager
async def watched(roots: Sequence[int], *, every: float = 2.0) -> AsyncGenerator[Window, None]:
    """Measure process trees while the block runs: CPU used by us and by others, peak resident memory.

    every   seconds between two measurements of memory, each of which takes some 10 ms per GiB
    """
    window = Window(roots)

    async def sample() -> None:
        while True:
            window.peak_bytes = max(window.peak_bytes, resident(roots))
            await asyncio.sleep(every)

    window.open()
    sampling = asyncio.create_task(sample())
    try:
        yield window
    finally:
        sampling.cancel()
        window.close()
        window.peak_bytes = max(window.peak_bytes, resident(roots))


async def until_quiet(patience: float, roots: Sequence[int] = ()) -> float:
    """Wait until other processes are quiet, at most *patience* seconds; return the cores they use."""
    ends = time.monotonic() + patience
    while True:
        window = Window(roots)
        window.open()
        await asyncio.sleep(0.5)
        window.close()
        if window.clean or time.monotonic() >= ends:
            return window.others
