"""Run a campaign: repetition by repetition, system by system, concurrency by concurrency.

One system is running at a time. Each cell is appended to a file immediately, so that an interrupted campaign
can be continued. A system that was far behind in the first repetition is not measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.driver import Run, closed_loop, measure
from benchmarks.serving.figures import WrongLength
from benchmarks.serving.systems import Place, System, SystemFailed
from benchmarks.serving.workload import Request, selection
from headrace.cli.launch.processes import ChildDied
from headrace.errors import HeadraceError

_WARM_UP = 8  # requests, all at once, before the first measurement
# How a failing peer may appear; it loses its own cells only.
_FAILURES = (SystemFailed, WrongLength, ChildDied, HeadraceError, OSError, TimeoutError, ExceptionGroup)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    seconds      no new request is sent after this time; 0 sends the whole workload
    leave_below  a system is measured only once if its best rate in the first repetition is below this
                 fraction of the fastest at that concurrency
    """

    systems: Sequence[System]
    concurrencies: Sequence[int]
    repetitions: int
    seconds: float
    tries: int
    patience: float
    leave_below: float


class Journal:
    """Stores cells on disk, one JSON line each: results and failures."""

    def __init__(self, file: Path, *, resume: bool) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            file.unlink(missing_ok=True)
        self.cells: list[dict[str, Any]] = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )

    def add(self, **cell: Any) -> None:
        """Append a cell to the file before returning."""
        self.cells.append(cell)
        with self._file.open("a") as out:
            out.write(json.dumps(cell) + "\n")

    def has(self, model: str, system: str, concurrency: int, repetition: int) -> bool:
        """Whether a cell was measured."""
        return any(
            (cell["model"], cell["system"], cell["concurrency"], cell["repetition"])
            == (model, system, concurrency, repetition)
            for cell in self.measured(model)
        )

    def measured(self, model: str) -> Iterator[dict[str, Any]]:
        """Return the cells of a model that have figures."""
        return (cell for cell in self.cells if cell["model"] == model and "figures" in cell)


def far_behind(cells: Sequence[dict[str, Any]], system: str, fraction: float) -> bool:
    """Return whether a system is below *fraction* of the fastest rate at every measured concurrency."""
    best: dict[int, float] = {}
    own: dict[int, float] = {}
    for cell in cells:
        rate, at = cell["figures"]["output_tokens_per_s"], cell["concurrency"]
        best[at] = max(best.get(at, 0.0), rate)
        if cell["system"] == system:
            own[at] = max(own.get(at, 0.0), rate)
    return bool(own) and all(rate < fraction * best[at] for at, rate in own.items())


async def campaign(
    plan: Plan, place: Place, requests: Sequence[Request], journal: Journal, progress: Callable[[str], None]
) -> None:
    """Measure one model. A system that fails is reported in the journal, and the next one runs."""
    for repetition in range(plan.repetitions):
        for system in plan.systems:
            todo = [
                concurrency
                for concurrency in plan.concurrencies
                if not journal.has(place.model, system.name, concurrency, repetition)
            ]
            if not todo:
                continue
            label = f"{place.model} {system.name} {repetition + 1}/{plan.repetitions}"
            if missing := system.missing(place):
                if repetition == 0:
                    progress(f"{label}: skipped, {missing}")
                continue
            if not system.ours and far_behind(
                [cell for cell in journal.measured(place.model) if cell["repetition"] < repetition],
                system.name,
                plan.leave_below,
            ):
                progress(f"{label}: skipped, it is below {plan.leave_below:.0%} of the fastest")
                continue
            try:
                await _cells(plan, place, system, todo, repetition, requests, journal, progress, label)
            except _FAILURES as error:
                while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
                    error = error.exceptions[0]
                progress(f"{label}: failed: {type(error).__name__}: {error}")
                journal.add(model=place.model, system=system.name, repetition=repetition, error=str(error))


async def _cells(
    plan: Plan,
    place: Place,
    system: System,
    concurrencies: Sequence[int],
    repetition: int,
    requests: Sequence[Request],
    journal: Journal,
    progress: Callable[[str], None],
    label: str,
) -> None:
    progress(f"{label}: starting")
    began = time.perf_counter()
    async with system.open(place) as running:
        load = time.perf_counter() - began
        await closed_loop(running, requests[:_WARM_UP], _WARM_UP)
        for concurrency in concurrencies:

            def rejected(run: Run, at: int = concurrency) -> None:
                progress(f"{label}: {at} at a time: others used {run.others:.2f} cores; repeating")

            chosen = selection(requests, concurrency)
            run = await measure(
                running,
                chosen,
                concurrency,
                seconds=plan.seconds,
                tries=plan.tries,
                patience=plan.patience,
                rejected=rejected,
            )
            journal.add(
                model=place.model,
                system=system.name,
                concurrency=concurrency,
                repetition=repetition,
                load_s=load,
                versions=dict(running.versions),
                threads=place.threads,
                **run.as_json(),
            )
            progress(f"{label}: {concurrency} at a time: {_summary(run)} (ready after {load:.0f} s)")


def _summary(run: Run) -> str:
    figures = run.figures
    flag = "" if run.clean else f", NOT CLEAN: others {run.others:.2f} cores"
    return (
        f"{figures['output_tokens_per_s']:.0f} tokens/s, TTFT p50 {figures['ttft_p50_ms']:.0f} ms, "
        f"ITL p50 {figures.get('itl_p50_ms', 0):.1f} ms, {run.peak_mib:.0f} MiB, "
        f"{figures['duration_s']:.0f} s{flag}"
    )
