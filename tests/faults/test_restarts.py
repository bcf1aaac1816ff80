"""Rolling restarts of every service under load are invisible to callers."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncGenerator, Callable

import pytest

from headrace.client import Client
from tests.faults.fleet import Fleet, Plan, fleet
from tests.faults.secured import connect
from tests.faults.tally import Row, Visit, request, visit


@pytest.fixture(scope="module")
async def rolling(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Fleet, None]:
    drain = ("--drain-seconds", "2")
    plan = Plan(
        worker_flags=(*Plan.worker_flags, *drain),
        batcher_flags=(*Plan.batcher_flags, *drain),
        router_flags=("--poll-seconds", "0.25", *drain),
    )
    async with fleet(plan, tmp_path_factory.mktemp("rolling")) as running:
        yield running


@pytest.mark.parametrize("service", ["workers", "batchers", "routers"])
async def test_a_rolling_restart_is_invisible_to_callers(
    rolling: Fleet, row: Callable[[str], Row], rng: random.Random, service: str
) -> None:
    """Some answers outlast the drain of two seconds, so that they are handed over."""
    counted = row(f"rolling restart of the {service}")
    codes = []
    async with connect(rolling.target) as client:
        load = Load(client, rng, callers=8)
        await load.served(8)
        for child in getattr(rolling, service):
            child.send(signal.SIGTERM)
            codes.append(await child.gone())
            await child.restart()
            await load.served(8)
        counted.add(await load.stop())

    counted.check()
    assert codes == [0, 0]


class Load:
    """Callers that send one request after another until `stop`."""

    def __init__(self, client: Client, rng: random.Random, *, callers: int) -> None:
        self._client = client
        self._rng = rng
        self._visits: list[Visit] = []
        self._enough = False
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(callers)]

    async def served(self, count: int) -> None:
        """Wait until so many more requests have been answered."""
        until = len(self._visits) + count
        while len(self._visits) < until:
            await asyncio.sleep(0.01)

    async def stop(self) -> list[Visit]:
        """Wait for the last answers. Returns all results."""
        self._enough = True
        await asyncio.gather(*self._tasks)
        return self._visits

    async def _call(self, number: int) -> None:
        while not self._enough:
            # Every fourth answer takes longer than a drain.
            tokens = 300 if number % 4 == 0 else 60
            asked = request(self._rng, number, min_tokens=20, max_tokens=tokens)
            self._visits.append(await visit(self._client, asked))
