"""Measure the CPU time that a request takes in each process, under a steady load of short answers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.mesh.answers import ask, closed_loop
from benchmarks.mesh.systems import (
    EngineSpec,
    Served,
    in_turn,
    median_run,
    progress,
    serving,
    systems,
    window,
)
from benchmarks.mesh.tables import show_table

TOKENS, STEP_SECONDS = 16, 0.01
WARM_UP_SECONDS = 2.0
SERVICES = ("router", "batcher", "worker")


@dataclass(frozen=True)
class Cost:
    """One run.

    seconds_per_request   of CPU, by process: router, batcher, worker, and this process as client
    others                cores that other processes of the machine used during the run
    """

    what: str
    callers: int
    requests: int
    requests_per_second: float
    seconds_per_request: Mapping[str, float]
    others: float = 0.0

    @property
    def services(self) -> float:
        """CPU seconds per request in all services, without the client."""
        return sum(self.seconds_per_request[kind] for kind in SERVICES)


def per_request(before: Mapping[str, float], after: Mapping[str, float], requests: int) -> dict[str, float]:
    """Return the CPU time per request of each process, from what it had used before and after."""
    return {kind: (after[kind] - before[kind]) / requests for kind in before}


async def measure(arguments: argparse.Namespace) -> list[Cost]:
    """Return the median run of each system."""
    runs: dict[str, list[Cost]] = {}
    async with serving(systems(arguments.before), EngineSpec(STEP_SECONDS)) as served:
        for repetition in range(arguments.repeat):
            for name in in_turn(list(served), repetition):
                if name not in runs:
                    await run_once(served[name], arguments.callers, WARM_UP_SECONDS)
                async with window(served, arguments.patience) as measured:
                    run = await run_once(served[name], arguments.callers, arguments.seconds)
                run = replace(run, others=measured.others)
                runs.setdefault(name, []).append(run)
                progress(
                    f"cpu: {name}, run {repetition + 1} of {arguments.repeat}: "
                    f"{run.services * 1e3:.2f} ms per request"
                )
        return [median_run(runs[name], lambda run: run.services) for name in served]


async def run_once(served: Served, callers: int, seconds: float) -> Cost:
    """Return the cost of the requests that *callers* send within *seconds*, each one after the other."""
    began, before = time.perf_counter(), served.cpu_seconds()
    done = await closed_loop(callers, seconds, lambda number: ask(served.client, number, TOKENS))
    took, after = time.perf_counter() - began, served.cpu_seconds()
    each = per_request(before, after, len(done))
    return Cost(served.name, callers, len(done), len(done) / took, each)


def show(costs: Sequence[Cost]) -> None:
    """Print the costs as a table."""
    show_table(
        f"CPU ms per request: {costs[0].callers} callers, answers of {TOKENS} tokens, "
        f"steps of {STEP_SECONDS * 1e3:g} ms",
        ("what", "requests", "requests/s", "services", *SERVICES, "client", "others"),
        [
            [
                cost.what,
                str(cost.requests),
                f"{cost.requests_per_second:.0f}",
                f"{cost.services * 1e3:.2f}",
                *(f"{cost.seconds_per_request[kind] * 1e3:.2f}" for kind in (*SERVICES, "client")),
                f"{cost.others:.2f}",
            ]
            for cost in costs
        ],
    )
