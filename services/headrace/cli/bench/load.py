"""Send requests through a backend: a number at a time (closed loop), or at planned times (open loop).

An open loop does not wait for answers, so that a slow server does not slow down the load. The latencies of
its requests count from the planned time: they include the time that a request waits in this process, for its
turn or because the process is busy. To leave that out is known as coordinated omission.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from array import array
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from headrace.cli.bench.arrivals import arrivals
from headrace.cli.bench.options import Load
from headrace.cli.bench.records import Failed, Record

if TYPE_CHECKING:
    from headrace.cli.bench.backends.backend import Backend
    from headrace.cli.bench.prompts import Prompts

_HEARTBEAT = 0.01


@dataclass
class Run:
    """What happened, while it happens: it is complete when `send` returns, and valid when that is cancelled.

    records     of all requests that were to be sent, in that order
    began       when the first could be sent, by `time.perf_counter`
    ended       when the last was complete
    cpu         CPU seconds of this process in between
    late        how much later than planned requests of an open loop were started, in seconds
    lags        how much later than planned this process ran every 10 ms, in seconds
    """

    records: list[Record] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    cpu: float = 0.0
    late: array[float] = field(default_factory=lambda: array("d"))
    lags: array[float] = field(default_factory=lambda: array("d"))
    active: set[int] = field(default_factory=set)  # numbers of the requests in flight
    completed: int = 0
    failed: int = 0
    tokens: int = 0  # of the requests that are not in flight

    def tokens_so_far(self) -> int:
        """Return the number of tokens that have arrived, as far as it is known."""
        return self.tokens + sum(self.records[number].tokens for number in self.active)


async def send(
    backend: Backend, prompts: Prompts, load: Load, run: Run, *, first: int = 0, keep_text: bool = False
) -> None:
    """Send the load, and write it into *run*.

    first       number of the first prompt
    keep_text   whether records keep the text of answers
    """
    sender = _Sender(backend, prompts, load, run, first, keep_text)
    run.began, cpu = time.perf_counter(), time.process_time()
    heart = asyncio.create_task(_beat(run.lags))
    try:
        await (sender.closed_loop(load.concurrency) if load.concurrency is not None else sender.open_loop())
    finally:
        heart.cancel()
        run.ended, run.cpu = time.perf_counter(), time.process_time() - cpu


async def warm_up(backend: Backend, prompts: Prompts, load: Load, requests: int, *, before: int) -> None:
    """Send *requests* with the concurrency of *load*, which are not measured. Raises Failed if all failed.

    before   their prompts are those before this number
    """
    at_once = load.concurrency or load.max_concurrency or requests
    closed = replace(load, concurrency=min(at_once, requests), rate=None, requests=requests, seconds=None)
    run = Run()
    await send(backend, lambda number: prompts(before - 1 - number), closed, run)
    if run.failed == requests:
        worst = next(record for record in run.records if record.error)
        raise Failed(worst.error, worst.message)


@dataclass
class _Sender:
    backend: Backend
    prompts: Prompts
    load: Load
    run: Run
    first: int
    keep_text: bool

    async def closed_loop(self, concurrency: int) -> None:
        """Keep *concurrency* requests in flight."""
        numbers: Iterator[int] = itertools.count()
        if self.load.requests is not None:
            numbers = iter(range(self.load.requests))

        async def client() -> None:
            for _ in numbers:
                now = time.perf_counter()
                if self.load.seconds is not None and now - self.run.began >= self.load.seconds:
                    return
                await self._request(self._record(now))

        async with asyncio.TaskGroup() as clients:
            for _ in range(min(concurrency, self.load.requests or concurrency)):
                clients.create_task(client())

    async def open_loop(self) -> None:
        """Start requests at their planned times."""
        load = self.load
        assert load.rate is not None, "an open loop has a rate"
        plan = arrivals(
            load.rate,
            burstiness=load.burstiness,
            seed=load.seed,
            requests=load.requests,
            seconds=load.seconds,
        )
        slots = nullcontext() if load.max_concurrency is None else asyncio.Semaphore(load.max_concurrency)

        async def request(number: int) -> None:
            async with slots:
                await self._request(number)

        async with asyncio.TaskGroup() as requests:
            for offset in plan:
                planned = self.run.began + offset
                if (wait := planned - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                now = time.perf_counter()
                self.run.late.append(max(now - planned, 0.0))
                # The timers of event loops are only exact to a millisecond and may be early.
                requests.create_task(request(self._record(min(planned, now))))

    def _record(self, planned: float) -> int:
        """Add a record, and return its number."""
        self.run.records.append(Record(planned=planned, parts=[] if self.keep_text else None))
        return len(self.run.records) - 1

    async def _request(self, number: int) -> None:
        run = self.run
        record = run.records[number]
        prompt = self.prompts(self.first + number)
        run.active.add(number)
        record.sent = time.perf_counter()
        if self.load.rate is None:
            record.planned = record.sent
        try:
            await self.backend.ask(prompt, record, timeout=self.load.timeout)
            run.completed += 1
        except Failed as failure:
            record.fail(failure)
            run.failed += 1
        finally:
            run.active.discard(number)
            run.tokens += record.tokens


async def _beat(lags: array[float]) -> None:
    """Record how late this process runs."""
    while True:
        due = time.perf_counter() + _HEARTBEAT
        await asyncio.sleep(_HEARTBEAT)
        lags.append(max(time.perf_counter() - due, 0.0))
