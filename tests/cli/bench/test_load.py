"""Load is sent as planned, whatever the answers do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from headrace.cli.bench.load import Run, send, warm_up
from headrace.cli.bench.options import Load
from headrace.cli.bench.prompts import ListedPrompts, Prompt
from headrace.cli.bench.records import Failed, Record
from tests.harness import PATIENCE, eventually

PROMPTS = ListedPrompts([Prompt((("user", f"prompt {number}"),)) for number in range(5)], max_tokens=3)


@dataclass
class Server:
    """A backend that answers when it is allowed to, and counts."""

    name: str = "test"
    where: str = "here"
    model: str = "m"
    texts: list[str] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0
    ended: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    fails: Callable[[int], bool] = lambda number: False

    async def ask(self, prompt: Prompt, record: Record, *, timeout: float) -> None:
        number = len(self.texts)
        self.texts.append(prompt.turns[-1][1])
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await self.open.wait()
            if self.fails(number):
                raise Failed("broken", f"request {number}")
            record.times.append(time.perf_counter())
            record.succeed()
        finally:
            self.in_flight -= 1
            self.ended += 1

    def text_of(self, record: Record) -> str:
        return ""


def answering(**others: object) -> Server:
    server = Server(**others)  # type: ignore[arg-type]
    server.open.set()
    return server


async def test_a_closed_loop_keeps_its_number_in_flight() -> None:
    server, run = Server(), Run()

    sending = asyncio.create_task(send(server, PROMPTS, Load(concurrency=3, requests=10), run))
    await eventually(lambda: server.in_flight == 3)
    assert len(run.active) == 3
    server.open.set()
    await sending

    assert server.most == 3
    assert (run.completed, run.failed, len(run.records)) == (10, 0, 10)
    assert server.texts == [f"prompt {number % 5}" for number in range(10)], "each prompt in its turn"
    assert all(record.planned == record.sent for record in run.records), "there is no plan"
    assert run.tokens_so_far() == 10
    assert not run.late
    assert run.ended > run.began


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    """Otherwise a server that stalls would get no load while it does, and look well."""
    server, run = Server(), Run()

    sending = asyncio.create_task(send(server, PROMPTS, Load(rate=1000.0, requests=20), run))
    await eventually(lambda: server.in_flight == 20)
    server.open.set()
    await sending

    assert run.completed == 20
    assert len(run.late) == 20
    assert all(record.planned <= record.sent for record in run.records)
    planned = [record.planned for record in run.records]
    assert planned == sorted(planned)
    assert planned[-1] - run.began == pytest.approx(0.02, abs=0.005), (
        "as the rate says, also on a busy machine"
    )


async def test_what_waits_for_its_turn_counts_from_its_planned_time() -> None:
    server, run = Server(), Run()

    load = Load(rate=1000.0, max_concurrency=2, requests=6)
    sending = asyncio.create_task(send(server, PROMPTS, load, run))
    await eventually(lambda: len(run.records) == 6 and server.in_flight == 2)
    released = time.perf_counter()
    server.open.set()
    await sending

    assert server.most == 2
    assert sum(record.sent >= released for record in run.records) == 4
    for waited in run.records[2:]:
        assert waited.ttft >= released - waited.planned
        assert waited.queue_time > 0


async def test_a_time_ends_the_load_and_answers_are_completed() -> None:
    server, run = answering(), Run()

    await send(server, PROMPTS, Load(concurrency=2, seconds=0.05), run)

    assert run.completed == len(run.records) > 0
    assert not run.active
    assert run.ended - run.began >= 0.05


async def test_failures_do_not_stop_the_load() -> None:
    server, run = answering(fails=lambda number: number % 2 == 0), Run()

    await send(server, PROMPTS, Load(concurrency=1, requests=4), run)

    assert (run.completed, run.failed) == (2, 2)
    assert [(one.error, one.message, one.complete) for one in run.records] == [
        ("broken", "request 0", False),
        ("", "", True),
        ("broken", "request 2", False),
        ("", "", True),
    ]


@pytest.mark.parametrize("load", [Load(concurrency=4, requests=100), Load(rate=1000.0, requests=100)])
async def test_what_was_measured_when_the_load_is_cancelled_is_kept(load: Load) -> None:
    server, run = Server(), Run()

    sending = asyncio.create_task(send(server, PROMPTS, load, run))
    await eventually(lambda: server.in_flight >= 4)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(sending, PATIENCE)

    assert server.in_flight == 0, "all requests are cancelled"
    assert run.ended > run.began
    assert not any(record.complete or record.error for record in run.records)


async def test_prompts_of_a_run_have_their_own_numbers() -> None:
    server = answering()
    numbers: list[int] = []

    def prompts(number: int) -> Prompt:
        numbers.append(number)
        return Prompt((("user", "x"),), 1)

    await warm_up(server, prompts, Load(concurrency=2, requests=100), 3, before=-1)
    await send(server, prompts, Load(concurrency=1, requests=2), Run(), first=40)

    assert numbers == [-2, -3, -4, 40, 41], "a warm-up does not use the prompts that are measured"


async def test_a_warm_up_that_fails_as_a_whole_is_a_failure() -> None:
    await warm_up(answering(fails=lambda number: number == 0), PROMPTS, Load(rate=1.0), 2, before=0)

    with pytest.raises(Failed, match="request 0"):
        await warm_up(answering(fails=lambda number: True), PROMPTS, Load(rate=1.0), 2, before=0)


async def test_lags_of_this_process_are_recorded() -> None:
    server, run = Server(), Run()

    sending = asyncio.create_task(send(server, PROMPTS, Load(concurrency=1, requests=1), run))
    await eventually(lambda: len(run.lags) > 1)
    before = len(run.lags)
    time.sleep(0.1)  # noqa: ASYNC251 - a busy process does this
    await eventually(lambda: len(run.lags) > before)
    server.open.set()
    await sending

    assert max(run.lags) > 0.05
