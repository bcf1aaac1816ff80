"""Profile each service under load, and write its functions by their own time.

py-spy, if it is installed, samples the threads that hold the interpreter's lock, and slows them little. Work
of gRPC's core outside of the lock is not counted; its work under the lock counts for the function that called
it. Without py-spy, cProfile measures the main thread: it slows small functions most, so its shares are only a
rough guide, and its times include the waiting of the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.mesh.answers import ask, closed_loop
from benchmarks.mesh.stages import PROBE
from benchmarks.mesh.systems import EngineSpec, Served, System, progress, serving

STREAMS, TOKENS, STEP_SECONDS = 256, 128, 0.01
SAMPLES_PER_SECOND = 200
TOP = 40
OUT = Path("build/bench-mesh-profile")


def own_samples(stacks: Sequence[str]) -> list[tuple[str, int]]:
    """Return the functions and the number of samples in which they ran themselves, largest first.

    stacks   lines of py-spy's raw format: functions separated by semicolons, innermost last, and the number
             of samples
    """
    counts: Counter[str] = Counter()
    for line in stacks:
        stack, _, samples = line.rpartition(" ")
        counts[stack.rpartition(";")[2]] += int(samples)
    return counts.most_common()


async def measure(arguments: argparse.Namespace) -> list[str]:
    """Write a profile of each service under load; return the names of the files."""
    os.makedirs(OUT, exist_ok=True)
    sampler = shutil.which("py-spy")
    environment = {}
    if sampler is None:
        environment = {
            "PYTHONPATH": str(PROBE),
            "HEADRACE_PROBE_OUT": f"{os.getcwd()}/{OUT}/KIND.txt",
            "HEADRACE_PROBE_SIGNAL": str(int(signal.SIGUSR1)),
        }
    progress(f"profile: {STREAMS} streams, with {'py-spy' if sampler else 'cProfile'}")
    async with serving([System("mesh", environment=environment)], EngineSpec(STEP_SECONDS)) as started:
        served = started["mesh"]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                closed_loop(STREAMS, arguments.seconds + 2, lambda number: ask(served.client, number, TOKENS))
            )
            await asyncio.sleep(1.0)  # until all streams have begun
            if sampler:
                for kind in served.processes:
                    tasks.create_task(_sample(sampler, served, kind, arguments.seconds))
            else:
                for process in served.processes.values():
                    process.send_signal(signal.SIGUSR1)
        kinds = list(served.processes)
    return [str(OUT / f"{kind}.txt") for kind in kinds]


async def _sample(sampler: str, served: Served, kind: str, seconds: float) -> None:
    """Sample one process with py-spy, and write its functions."""
    raw, pid = OUT / f"{kind}.raw", served.processes[kind].pid
    child = await asyncio.create_subprocess_exec(
        *(sampler, "record", "--pid", str(pid), "--duration", str(round(seconds)), "--format", "raw"),
        *("--rate", str(SAMPLES_PER_SECOND), "--function", "--gil", "--output", str(raw)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await child.communicate()
    if child.returncode:
        raise SystemExit(f"py-spy failed, perhaps because it may not trace other processes: {error.decode()}")
    counts = own_samples(raw.read_text().splitlines())
    raw.unlink()
    total = sum(count for _, count in counts)
    busy = total / (SAMPLES_PER_SECOND * round(seconds))
    lines = [f"{count / total:6.1%}  {name}" for name, count in counts[:TOP]]
    title = (
        f"{kind}, {STREAMS} streams: held the lock for {busy:.0%} of {round(seconds)} s; own shares of it:"
    )
    (OUT / f"{kind}.txt").write_text("\n".join([title, *lines, ""]))


def show(kept: Sequence[str]) -> None:
    """Print where the profiles are."""
    print("profiles:", *kept)
