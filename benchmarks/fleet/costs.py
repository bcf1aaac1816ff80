"""Measure the CPU time of router and batcher with echo workers: what a request, message and token cost.

Workers sleep for the time of a step, so a hundred of them run on one machine. Callers make one call after
another; the figures are of a window in which all callers are busy. A message is what a worker sends to one
batcher after a step: the tokens of all of that batcher's sequences.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from benchmarks import machine
from benchmarks.fleet.processes import Fleet, RunningFleet, running
from benchmarks.fleet.simulation import Costs
from benchmarks.mesh.answers import Answer, ask, closed_loop
from benchmarks.mesh.systems import LIMITS, progress
from headrace.cli.bench.latencies import percentile
from headrace.client import Client, connect
from headrace.errors import HeadraceError

WARM_UP_SECONDS = 2.0
SERVICES = ("router", "batcher")


@dataclass(frozen=True)
class Cell:
    """What to run: concurrent streams per worker, the time of a step, and the tokens of an answer.

    No streams measure the idle mesh.
    """

    workers: int
    streams: int
    step_seconds: float
    tokens: int = 64
    batchers: int = 1
    routers: int = 1


# Workers with many streams and with few, short answers and long ones: so requests, messages and tokens can be
# told apart. Steps are slower where there are more workers, because their own loops share the machine.
CELLS = (
    Cell(1, 0, 0.02),
    Cell(1, 1, 0.02),
    Cell(1, 16, 0.02),
    Cell(1, 64, 0.02, tokens=16),
    Cell(1, 64, 0.02, tokens=256),
    Cell(10, 0, 0.05),
    Cell(10, 1, 0.05),
    Cell(10, 8, 0.05, tokens=16),
    Cell(10, 8, 0.05),
    Cell(10, 32, 0.05),
    Cell(10, 8, 0.05, batchers=2),
    Cell(10, 8, 0.05, batchers=2, routers=2),
    Cell(50, 0, 0.1),
    Cell(50, 1, 0.1),
    Cell(50, 8, 0.1),
    Cell(50, 8, 0.1, batchers=2, routers=2),
    Cell(100, 0, 0.2),
    Cell(100, 1, 0.2),
    Cell(100, 8, 0.2),
)


@dataclass(frozen=True)
class Measured:
    """One cell. Rates per second; times in seconds.

    messages   of workers to batchers
    cores      busy cores of all processes of a kind: router, batcher, worker, and this process as client
    others     cores that other processes of the machine used
    failed     requests; the others are counted
    """

    cell: Cell
    seconds: float
    requests: float
    tokens: float
    messages: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    cores: Mapping[str, float]
    others: float
    failed: int = 0

    def saturates(self) -> tuple[str, float]:
        """Return which kind saturates first, and the tokens per second at which one core is not enough.

        It assumes that the CPU time grows with the load.
        """
        counts = {"router": self.cell.routers, "batcher": self.cell.batchers}
        kind = max(counts, key=lambda kind: self.cores[kind] / counts[kind])
        return kind, self.tokens * counts[kind] / self.cores[kind]


async def measure(cells: Sequence[Cell], seconds: float, repeat: int = 1) -> list[Measured]:
    """Run all cells *repeat* times; neighbours with the same processes share them."""
    kept = []
    for fleet_of, group in groupby(cells, key=lambda cell: replace(cell, streams=0, tokens=0)):
        own = list(group)
        with tempfile.TemporaryDirectory() as folder:
            most = max(1, *(2 * cell.streams for cell in own))
            fleet = Fleet(
                logs=Path(folder),
                workers=fleet_of.workers,
                batchers=fleet_of.batchers,
                routers=fleet_of.routers,
                environment=LIMITS,
                flags={
                    "worker": [
                        *("--engine", "echo", "--fake-step-seconds", str(fleet_of.step_seconds)),
                        *("--max-running", str(most), "--no-prefix-cache"),
                    ],
                    "batcher": ["--fake"],
                },
            )
            async with running(fleet) as started:
                for cell in own * repeat:
                    kept.append(await _cell(cell, started, seconds))
                    progress(f"{cell}: {kept[-1].tokens:,.0f} tokens/s, others {kept[-1].others:.2f}")
    return kept


async def _cell(cell: Cell, fleet: RunningFleet, seconds: float) -> Measured:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(address)) for address in fleet.routers]
        # The first calls are spread over an answer, so that answers begin and end all the time.
        spread = cell.tokens * cell.step_seconds * 1.2
        wait = spread + WARM_UP_SECONDS if cell.streams else 0.0
        window = asyncio.create_task(_window(fleet, wait, seconds))
        answers: list[Answer | None] = []
        if callers := cell.workers * cell.streams:
            call = partial(_call, clients, cell.tokens)
            answers = await closed_loop(callers, wait + seconds, call, spread=spread)
        began, ended, cores, others = await window
    return summarize(cell, answers, began, ended, cores, others)


async def _call(clients: Sequence[Client], tokens: int, number: int) -> Answer | None:
    try:
        return await ask(clients[number % len(clients)], number, tokens)
    except HeadraceError:  # a machine that is too busy for so many processes
        return None


async def _window(
    fleet: RunningFleet, wait: float, seconds: float
) -> tuple[float, float, dict[str, float], float]:
    """Measure CPU time in a window; returns its begin and end, busy cores by kind, and those of others."""
    processes = {kind: [psutil.Process(pid) for pid in own] for kind, own in fleet.pids.items()}
    await asyncio.sleep(wait)
    began, busy, before = time.perf_counter(), machine.busy_seconds(), _cpu(processes)
    await asyncio.sleep(seconds)
    ended, still, after = time.perf_counter(), machine.busy_seconds(), _cpu(processes)
    cores = {kind: (after[kind] - before[kind]) / (ended - began) for kind in before}
    others = (still - busy) / (ended - began) - sum(cores.values()) if busy and still else 0.0
    return began, ended, cores, max(others, 0.0)


def _cpu(processes: Mapping[str, Sequence[psutil.Process]]) -> dict[str, float]:
    used = {"client": time.process_time()}
    for kind, own in processes.items():
        # Not `machine.cpu_seconds`, which looks for descendants: too slow for a hundred processes.
        times = [process.cpu_times() for process in own]
        used[kind] = sum(each.user + each.system for each in times)
    return used


def summarize(
    cell: Cell,
    every: Sequence[Answer | None],
    began: float,
    ended: float,
    cores: Mapping[str, float],
    others: float,
) -> Measured:
    """Count what happened between two times; answers may reach beyond them. None is one that failed."""
    seconds, answers = ended - began, [answer for answer in every if answer is not None]
    tokens = sum(count for answer in answers for at, count in answer.arrivals if began <= at < ended)
    whole = [answer for answer in answers if began <= answer.ended < ended]
    ttfts = [answer.first - answer.began for answer in whole] or [0.0]
    tpot = statistics.median([answer.tpot for answer in whole] or [0.0])
    return Measured(
        cell=cell,
        seconds=seconds,
        requests=len(whole) / seconds,
        tokens=tokens / seconds,
        # Each worker makes a step in the time of a token, and sends its tokens to every batcher that has
        # sequences there: all of them, if there are more sequences than batchers.
        messages=cell.workers * min(cell.batchers, cell.streams) / tpot if tpot else 0.0,
        ttft_p50=statistics.median(ttfts),
        ttft_p99=percentile(ttfts, 99),
        tpot_p50=tpot,
        cores=dict(cores),
        others=others,
        failed=len(every) - len(answers),
    )


def fit(kept: Sequence[Measured], kind: str) -> tuple[Costs, float]:
    """Return what one process of a kind spends, and the cores that it uses for each idle worker.

    A least-squares fit of relative errors, without negative costs.
    """
    counts = {"router": [one.cell.routers for one in kept], "batcher": [one.cell.batchers for one in kept]}
    rows = np.array(
        [
            [one.requests, one.messages, one.tokens, one.cell.workers * count if kind == "batcher" else count]
            for one, count in zip(kept, counts[kind], strict=True)
        ]
    )
    busy = np.array([one.cores[kind] for one in kept])
    request, message, token, idle = nonnegative_fit(rows / busy[:, None], np.ones(len(kept)))
    return Costs(request, message, token), idle


def nonnegative_fit(rows: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> list[float]:
    """Return x >= 0 with a small |rows x - wanted|: what would be negative is removed, worst first."""
    kept = list(range(rows.shape[1]))
    found = np.zeros(rows.shape[1])
    while kept:
        found[:] = 0.0
        found[kept] = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
        worst = min(kept, key=lambda column: found[column])
        if found[worst] >= 0:
            break
        kept.remove(worst)
    return [float(value) for value in found]


def markdown(kept: Sequence[Measured], described: str) -> str:
    """Return the cells as a table, with a description of machine and date."""
    head = (
        "| workers x streams | step, ms | tokens of an answer | batchers, routers | requests/s | tokens/s "
        "| TTFT p50 / p99, ms | TPOT p50, ms | cores: routers, batchers | us of a token: router, batcher "
        "| one core each is enough for tokens/s | others |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    lines = [head, *(f"| {' | '.join(_cells(one))} |" for one in kept), "", f"{described}."]
    if (most := max(one.others for one in kept)) > machine.QUIET:
        lines += [
            f"**Not a quiet machine**: other processes used up to {most:.1f} cores. CPU times are higher",
            "than on an idle one, latencies are of little use, and so is what is computed from these costs.",
        ]
    return "\n".join(lines) + "\n"


def fitted_markdown(kept: Sequence[Measured]) -> str:
    """Return the fitted costs as a table, and how far the fit is from what was measured."""
    lines = [
        "| CPU time, us | of a request | of a message | of a token | of a second: idle | median error |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind in SERVICES:
        costs, idle = fit(kept, kind)
        errors = [
            abs(_predicted(one, kind, costs, idle) / one.cores[kind] - 1) for one in kept if one.requests
        ]
        spent = f"{costs.request * 1e6:,.0f} | {costs.message * 1e6:,.0f} | {costs.token * 1e6:.1f}"
        each = " for each worker" if kind == "batcher" else ""
        lines.append(f"| {kind} | {spent} | {idle * 1e6:,.0f}{each} | {statistics.median(errors):.0%} |")
    return "\n".join(lines) + "\n"


def _predicted(one: Measured, kind: str, costs: Costs, idle: float) -> float:
    count = one.cell.routers if kind == "router" else one.cell.batchers * one.cell.workers
    return costs.cores(one.requests, one.messages, one.tokens) + idle * count


def _cells(one: Measured) -> list[str]:
    cell = one.cell
    cores = f"{one.cores['router']:.3f}, {one.cores['batcher']:.3f}"
    head = [f"{cell.workers} x {cell.streams}", f"{cell.step_seconds * 1e3:g}"]
    if not cell.streams:
        return [*head, "", f"{cell.batchers}, {cell.routers}", *[""] * 4, cores, "", "", f"{one.others:.2f}"]
    kind, tokens = one.saturates()
    return [
        *(*head, str(cell.tokens), f"{cell.batchers}, {cell.routers}"),
        f"{one.requests:.1f}" + (f", {one.failed} failed" if one.failed else ""),
        f"{one.tokens:,.0f}",
        *(f"{one.ttft_p50 * 1e3:.0f} / {one.ttft_p99 * 1e3:.0f}", f"{one.tpot_p50 * 1e3:.1f}", cores),
        ", ".join(f"{one.cores[each] / one.tokens * 1e6:.0f}" for each in SERVICES),
        *(f"{tokens:,.0f} ({kind})", f"{one.others:.2f}"),
    ]


def as_json(kept: Sequence[Measured]) -> dict[str, Any]:
    """Return the cells and the fitted costs, as `costs_of` reads them."""
    fitted = {kind: fit(kept, kind) for kind in SERVICES}
    return {
        "costs": {kind: {**asdict(costs), "idle": idle} for kind, (costs, idle) in fitted.items()},
        "cells": [asdict(one) for one in kept],
    }


def cells_of(written: Mapping[str, Any]) -> list[Measured]:
    """Read the cells from what `as_json` returned."""
    return [Measured(**{**one, "cell": Cell(**one["cell"])}) for one in written["cells"]]


def costs_of(written: Mapping[str, Any], kind: str) -> Costs:
    """Read the costs of a kind of service from what `as_json` returned."""
    found = written["costs"][kind]
    return Costs(found["request"], found["message"], found["token"])
