"""Load a system with a closed loop of one concurrency, and record when each token arrives.

A client sends its next request as soon as its last answer is complete. After the time limit no new request is
sent, and in-flight ones are completed: each request counts in full, and all systems get a prefix of the same
workload.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import machine
from benchmarks.serving.figures import Answer, check, figures
from benchmarks.serving.systems import Running
from benchmarks.serving.workload import Request

REQUEST_SECONDS = 600.0  # after which an answer counts as lost


@dataclass(frozen=True)
class Run:
    """One run at one concurrency, and whether the machine was quiet.

    others, own    mean number of cores used by other processes, and by those that take part
    """

    figures: dict[str, float]
    clean: bool
    others: float
    own: float
    peak_mib: float
    complete: bool  # the whole workload was sent

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


async def closed_loop(
    running: Running, requests: Sequence[Request], concurrency: int, seconds: float = 0.0
) -> tuple[list[Answer], float]:
    """Send *requests* in order, *concurrency* at a time; none after *seconds*, if not 0.

    Returns the answers in order of completion, and the total time. Raises WrongLength, and the errors of the
    system.
    """
    todo = iter(requests)
    answers: list[Answer] = []
    began = time.perf_counter()

    async def client() -> None:
        for request in todo:
            if seconds and answers and time.perf_counter() - began > seconds:
                return
            answers.append(await _ask(running, request))

    async with asyncio.TaskGroup() as clients:
        for _ in range(min(concurrency, len(requests))):
            clients.create_task(client())
    took = time.perf_counter() - began
    check(answers)
    return answers, took


async def _ask(running: Running, request: Request) -> Answer:
    answer = Answer(request.id, request.output_tokens, time.perf_counter())
    async with asyncio.timeout(REQUEST_SECONDS), aclosing(running.generate(request)) as stream:
        async for ids in stream:
            if ids:
                answer.arrivals.append((time.perf_counter(), len(ids)))
    return answer


async def measure(
    running: Running,
    requests: Sequence[Request],
    concurrency: int,
    *,
    seconds: float = 0.0,
    tries: int = 3,
    patience: float = 30.0,
    rejected: Callable[[Run], None] = lambda run: None,
    quiet: Callable[[float, Sequence[int]], Awaitable[float]] = machine.until_quiet,
) -> Run:
    """Run the closed loop until a run is clean, at most *tries* times. Returns the cleanest run.

    patience   seconds to wait before each run for other processes to become quiet
    rejected   called with each run that is discarded
    """
    kept: list[Run] = []
    for attempt in range(tries):
        await quiet(patience, running.pids)
        async with machine.watched(running.pids) as window:
            answers, took = await closed_loop(running, requests, concurrency, seconds)
        run = Run(
            figures=figures(answers, took),
            clean=window.clean,
            others=window.others,
            own=window.own,
            peak_mib=window.peak_bytes / 2**20,
            complete=len(answers) == len(requests),
        )
        kept.append(run)
        if run.clean:
            break
        if attempt + 1 < tries:
            rejected(run)
    return min(kept, key=lambda run: run.others)
