"""Measure the memory of each process, idle and with many open streams."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from benchmarks.mesh.answers import TIMEOUT, request
from benchmarks.mesh.rates import max_running
from benchmarks.mesh.systems import EngineSpec, Served, progress, serving, systems
from benchmarks.mesh.tables import show_table
from headrace.client import Client

STEP_SECONDS = 0.25  # slow, so that the streams stay open and no process is busy
TOKENS = 1000
SETTLE_SECONDS = 2.0
MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Resident bytes of each process, idle and with open streams; both after the first requests."""

    what: str
    streams: int
    idle: Mapping[str, int]
    open: Mapping[str, int]

    def per_stream(self, kind: str) -> float:
        """Return the bytes that one stream takes in a process."""
        return (self.open[kind] - self.idle[kind]) / self.streams


async def measure(arguments: argparse.Namespace) -> list[Memory]:
    """Return the memory of each system."""
    streams = arguments.open_streams
    running = max_running(streams)
    engine = EngineSpec(STEP_SECONDS, max_running=running, step_tokens=4 * running)
    kept = []
    async with serving(systems(arguments.before), engine) as served:
        for one in served.values():
            progress(f"memory: {streams} open streams, {one.name}")
            kept.append(await _run(one, streams))
    return kept


async def _run(served: Served, streams: int) -> Memory:
    await asyncio.sleep(SETTLE_SECONDS)
    idle = served.resident_bytes()
    begun = asyncio.Semaphore(0)
    reading = [asyncio.create_task(_read(served.client, number, begun)) for number in range(streams)]
    try:
        async with asyncio.timeout(TIMEOUT):
            for _ in range(streams):
                await begun.acquire()
        await asyncio.sleep(SETTLE_SECONDS)
        for task in reading:
            if task.done():
                task.result()  # its error
                raise RuntimeError(f"a stream ended before all {streams} were open")
        return Memory(served.name, streams, idle, served.resident_bytes())
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def _read(client: Client, number: int, begun: asyncio.Semaphore) -> None:
    """Read one answer, and report its first token."""
    first = True
    async with aclosing(client.generate(request(number, TOKENS), timeout=TIMEOUT)) as stream:
        async for response in stream:
            if first and response.HasField("delta"):
                first = False
                begun.release()


def show(kept: Sequence[Memory]) -> None:
    """Print the memory of each process."""
    show_table(
        f"resident memory, idle and with {kept[0].streams} open streams",
        ("what", "process", "idle MiB", "open MiB", "kB per stream"),
        [
            [
                one.what,
                kind,
                f"{one.idle[kind] / MIB:.0f}",
                f"{one.open[kind] / MIB:.0f}",
                f"{one.per_stream(kind) / 1000:.1f}",
            ]
            for one in kept
            for kind in one.idle
        ],
    )
