"""The closed loop, and the choice among its runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from benchmarks import machine
from benchmarks.serving.driver import Run, closed_loop, measure
from benchmarks.serving.figures import WrongLength
from benchmarks.serving.workload import Request, load, selection


def requests(count: int) -> list[Request]:
    return [Request(number, "", (1, 2), 1 + number % 3) for number in range(count)]


class Counting:
    """Returns one id per turn of the event loop, and counts how many answers are in flight at once."""

    pids: Sequence[int] = ()
    versions: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, extra: int = 0) -> None:
        self.sent: list[int] = []
        self.live = self.most = 0
        self._extra = extra

    async def generate(self, request: Request) -> AsyncGenerator[list[int], None]:
        self.sent.append(request.id)
        self.live += 1
        self.most = max(self.most, self.live)
        try:
            for number in range(request.output_tokens + self._extra):
                await asyncio.sleep(0)
                yield [number]
                yield []  # a message without tokens, as some servers send, is no arrival
        finally:
            self.live -= 1


@pytest.mark.parametrize("concurrency", [1, 4, 50])
async def test_every_request_is_sent_once_in_order_at_the_concurrency(concurrency: int) -> None:
    system = Counting()

    answers, _ = await closed_loop(system, requests(20), concurrency)

    assert system.sent == list(range(20))
    assert system.most == min(concurrency, 20)
    assert sorted(answer.request for answer in answers) == list(range(20))
    assert all(answer.tokens == answer.wanted == len(answer.arrivals) for answer in answers)


async def test_after_the_time_limit_no_request_is_sent_and_in_flight_ones_are_completed() -> None:
    system = Counting()

    answers, _ = await closed_loop(system, requests(1000), 4, seconds=1e-9)

    assert 4 <= len(system.sent) < 1000
    assert len(answers) == len(system.sent)


@pytest.mark.parametrize("extra", [-1, 1])
async def test_an_answer_with_too_few_or_too_many_tokens_is_detected(extra: int) -> None:
    with pytest.raises(WrongLength):
        await closed_loop(Counting(extra), requests(3)[2:], 1)


async def calm(patience: float, roots: Sequence[int]) -> float:
    return 0.0


def others(monkeypatch: pytest.MonkeyPatch, *used: float) -> None:
    """Let other processes use so many cores in each window to come."""
    left = list(used)

    def close(window: machine.Window) -> None:
        window.others = left.pop(0)

    monkeypatch.setattr(machine.Window, "close", close)


async def test_contaminated_runs_are_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, 1.5, 0.4, 0.02)
    rejected: list[Run] = []

    run = await measure(Counting(), requests(4), 2, rejected=rejected.append, quiet=calm)

    assert run.clean
    assert [each.others for each in rejected] == [1.5, 0.4]


async def test_the_cleanest_of_contaminated_runs_is_kept_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, 0.9, 0.3, 0.6)

    run = await measure(Counting(), requests(4), 2, tries=3, quiet=calm)

    assert not run.clean
    assert run.others == 0.3


def test_the_workload_matches_its_description() -> None:
    loaded = load(lambda text: list(text.encode()))

    assert len(loaded) == 64
    assert len({request.prompt for request in loaded}) == 64
    assert sum(request.output_tokens for request in loaded) == 4645
    assert all(16 <= request.output_tokens <= 128 for request in loaded)
    assert selection(loaded, 1) == loaded[:16]
    assert selection(loaded, 8) == loaded
