"""Let requests arrive at random at echo workers, and compare the waits with the simulation and with Erlang C.

Arrivals are a Poisson process: an open loop, which does not slow down when answers are late.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleet.processes import Fleet, running
from benchmarks.fleet.queueing import probability_of_waiting
from benchmarks.fleet.simulation import Engine, Load, Mesh, simulate
from benchmarks.mesh.answers import Answer, ask
from benchmarks.mesh.systems import progress
from headrace.cli.bench.latencies import percentile
from headrace.client import Client, connect

WORKERS, SLOTS, STEP_SECONDS = 4, 4, 0.02
SHORTEST, LONGEST = 16, 80  # tokens of an answer
SHARES = (0.5, 0.7, 0.8, 0.9)  # of the slots that the load occupies
ALONE = 20  # requests, one after another, from which the time of a step is taken


@dataclass(frozen=True)
class Arrived:
    """One load: requests per second, and times to the first token as measured and as simulated, in seconds.

    waiting   share of requests that find all slots in use, by Erlang C
    """

    share: float
    rate: float
    requests: int
    measured: tuple[float, float]
    simulated: tuple[float, float]
    waiting: float


def length(draw: random.Random) -> int:
    """Draw the tokens of an answer."""
    return draw.randint(SHORTEST, LONGEST)


async def measure(seconds: float) -> list[Arrived]:
    """Measure each load for at least *seconds*."""
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(
            logs=Path(folder),
            workers=WORKERS,
            flags={
                "worker": [
                    *("--engine", "echo", "--fake-step-seconds", str(STEP_SECONDS)),
                    *("--max-running", str(SLOTS), "--no-prefix-cache"),
                ],
                "batcher": ["--fake"],
            },
        )
        async with running(fleet) as started, connect(started.routers[0]) as client:
            alone = [await ask(client, number, LONGEST) for number in range(ALONE)]
            step = statistics.median(answer.tpot for answer in alone)
            # What the mesh adds to the first token, besides the step itself.
            added = max(0.0, statistics.median(answer.first - answer.began for answer in alone) - step)
            return [await _arrived(client, share, step, added, seconds) for share in SHARES]


async def _arrived(client: Client, share: float, step: float, added: float, seconds: float) -> Arrived:
    engine, slots = Engine(SLOTS, step), WORKERS * SLOTS
    service = step * (SHORTEST + LONGEST) / 2
    rate = share * slots / service
    warm_up = 4 * service  # the queue fills; these requests do not count
    ttfts = [
        answer.first - answer.began
        for after, answer in await _open_loop(client, rate, warm_up + seconds)
        if after >= warm_up
    ]
    simulated = simulate(
        Mesh(workers=WORKERS, engine=engine), Load(rate, 0, length), seconds=20_000 / rate, warm_up=warm_up
    )
    progress(f"arrivals: {share:.0%} of the slots, {len(ttfts)} requests")
    return Arrived(
        share,
        rate,
        len(ttfts),
        (percentile(ttfts, 50), percentile(ttfts, 99)),
        (simulated.ttft(50) + added, simulated.ttft(99) + added),
        probability_of_waiting(slots, share * slots),
    )


async def _open_loop(client: Client, rate: float, seconds: float) -> list[tuple[float, Answer]]:
    """Send requests at random times; returns each one's time and answer."""
    draw, loop = random.Random(1), asyncio.get_running_loop()
    began = at = loop.time()
    times: list[float] = []
    async with asyncio.TaskGroup() as tasks:
        calls: list[asyncio.Task[Answer]] = []
        while (at := at + draw.expovariate(rate)) < began + seconds:
            await asyncio.sleep(at - loop.time())
            times.append(at - began)
            calls.append(tasks.create_task(ask(client, len(calls) % 10_000, length(draw))))
    return list(zip(times, (call.result() for call in calls), strict=True))


def markdown(found: Sequence[Arrived]) -> str:
    """Return the loads as a table."""
    lines = [
        "| slots in use | requests/s | requests | TTFT p50, ms: measured | simulated "
        "| p99: measured | simulated | must wait, by Erlang C |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in found:
        times = (one.measured[0], one.simulated[0], one.measured[1], one.simulated[1])
        cells = (
            *(f"{one.share:.0%}", f"{one.rate:.1f}", str(one.requests)),
            *(f"{seconds * 1e3:,.0f}" for seconds in times),
            f"{one.waiting:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
