"""Measure the whole workload by the engine alone: its loop, without streams and gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.gpu import engines, limits
from benchmarks.gpu.report import Report
from benchmarks.gpu.requests import TEMPERATURE, Request, workload
from benchmarks.gpu.shapes import Shape
from headrace.worker.engine.interface import Engine
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import SamplingParams, SequenceSpec, StepReport


@dataclass
class Run:
    """What one run of the workload did.

    tokens, seconds   output tokens, and the time from the first request to the last token
    steps, rows       engine steps, and rows of all of them
    complete          whether all answers were complete when time was up
    """

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    preemptions: int = 0
    complete: bool = True
    faults: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


def run(report: Report, shape: Shape | None) -> None:
    """Measure one model: the share for the mesh, and the share for the comparison with others."""
    assert shape is not None
    options = report.options
    engine = engines.held(shape, options).engine
    step_tokens = engines.sizes(options).step_tokens
    warm_up = [replace(request, tokens=4) for request in workload(shape, 1.0, tiny=options.rehearse)[:4]]
    measure(engine, warm_up, step_tokens, report.left)
    for share in dict.fromkeys((options.share, options.peer_share)):
        if report.left < 3:
            report.row(f"{share:g} of the requests", note="skipped: no time is left")
            continue
        requests = workload(shape, share, tiny=options.rehearse)
        found = measure(engine, requests, step_tokens, report.left)
        show(report, shape, "engine alone", requests, found)
        if found.complete:
            report.fact(f"workload {shape.name} {share:g}", found.rate)


def show(report: Report, shape: Shape, what: str, requests: Sequence[Request], found: Run) -> None:
    """Report a run of an engine."""
    ceilings = report.ceilings
    lengths = [(len(request.ids), request.tokens) for request in requests]
    whole = len(requests) == 256
    note = f"{len(requests)} requests, {found.tokens} tokens in {found.seconds:.1f} s, {found.steps} steps"
    if found.preemptions:
        note += f", {found.preemptions} preemptions"
    if not found.complete:
        note += "; stopped when its time was up"
    report.row(
        f"{what}, {len(requests)} requests",
        found.rate,
        "tokens/s",
        limit=limits.workload_tokens_per_second(shape, ceilings, lengths) if ceilings else None,
        goal=limits.WORKLOAD.get(shape.name) if whole and found.complete else None,
        note=note,
    )
    if found.faults:
        raise RuntimeError(f"{len(found.faults)} sequences failed, the first: {found.faults[0]}")


def measure(engine: Engine, requests: Sequence[Request], step_tokens: int, seconds: float) -> Run:
    """Submit all requests at once, and wait for the answers, at most *seconds*."""
    found, done = Run(), threading.Event()
    left = len(requests)
    before: list[int] = []

    def on_report(step: StepReport[int]) -> None:
        nonlocal left
        found.steps += bool(step.rows)
        found.rows += step.rows
        before.append(step.preemptions) if not before else None
        found.preemptions = step.preemptions - before[0]
        for update in step.updates:
            found.tokens += len(update.token_ids)
            if update.finish is not None:
                left -= 1
                if update.fault:
                    found.faults.append(update.fault)
        if left == 0:
            found.seconds = time.perf_counter() - began
            done.set()

    loop: EngineLoop[int] = EngineLoop(engine, step_tokens=step_tokens, prefix_cache=False)
    specs = [
        SequenceSpec(index, list(request.ids), len(request.ids), _params(index, request.tokens))
        for index, request in enumerate(requests)
    ]
    began = time.perf_counter()
    loop.start(on_report)
    loop.submit(*specs)
    if not done.wait(max(seconds - 1, 1)):
        found.seconds = time.perf_counter() - began
        found.complete = False
    counted = found.tokens
    loop.stop()
    found.tokens = counted
    return found


def _params(seed: int, tokens: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=tokens, temperature=TEMPERATURE, ignore_eos=True)
