"""The network between the services resets, stalls and delays connections."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import pytest

from headrace.cli.launch.mesh import reserved_ports
from tests.faults.fleet import HOST, Fleet, Plan, fleet
from tests.faults.proxy import Proxy
from tests.faults.secured import connect
from tests.faults.tally import Row, Streams, mixed, until_affected, visit


@dataclass
class Wired:
    """A fleet whose first worker and first batcher are behind proxies."""

    fleet: Fleet
    to_worker: Proxy
    to_batcher: Proxy

    def __getitem__(self, name: str) -> Proxy:
        return self.to_worker if name == "worker" else self.to_batcher


@pytest.fixture(scope="module")
async def shared_wires(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Wired, None]:
    with reserved_ports(4) as ports:
        worker_ports, batcher_ports = ports[:2], ports[2:]
        to_worker, to_batcher = Proxy(f"{HOST}:{worker_ports[0]}"), Proxy(f"{HOST}:{batcher_ports[0]}")
        async with to_worker.serving(), to_batcher.serving():
            plan = Plan(
                routers=1,
                worker_ports=worker_ports,
                batcher_ports=batcher_ports,
                to_worker={0: to_worker.address},
                to_batcher={0: to_batcher.address},
                router_flags=("--poll-seconds", "0.25", "--stall-seconds", "2"),
            )
            async with fleet(plan, tmp_path_factory.mktemp("wired")) as running:
                yield Wired(running, to_worker, to_batcher)


@pytest.fixture
async def wired(shared_wires: Wired) -> AsyncGenerator[Wired, None]:
    """Return the fleet. All connections work before and after the test."""
    yield shared_wires
    for name in ("worker", "batcher"):
        shared_wires[name].thaw()
        shared_wires[name].delay = 0.0
    await shared_wires.fleet.heal()


@pytest.mark.parametrize("place", ["worker", "batcher"])
@pytest.mark.parametrize("harm", ["reset", "half-open", "partition"])
async def test_a_broken_connection(
    wired: Wired, row: Callable[[str], Row], rng: random.Random, place: str, harm: str
) -> None:
    counted = row(f"connection to a {place}: {harm}")
    async with connect(wired.fleet.target, retries=0) as client:
        for _ in until_affected(counted):
            await wired.fleet.heal()
            streams = Streams(client, mixed(rng, 24, min_tokens=100, max_tokens=150))
            await streams.reached(10)
            wire = wired[place]
            {"reset": wire.reset, "half-open": wire.freeze, "partition": wire.cut}[harm]()
            counted.add(await streams.done())
            # Data that was held back arrives late, and must be ignored.
            wire.thaw()
            counted.add(await asyncio.gather(*(visit(client, one) for one in mixed(rng, 8))))

    counted.check()
    assert counted.moved > 0, "the fault affected answers"


@pytest.mark.parametrize("place", ["worker", "batcher"])
async def test_a_slow_connection_loses_nothing(
    wired: Wired, row: Callable[[str], Row], rng: random.Random, place: str
) -> None:
    counted = row(f"50 ms of delay to a {place}")
    wired[place].delay = 0.05
    async with connect(wired.fleet.target, retries=0) as client:
        counted.add(await asyncio.gather(*(visit(client, one) for one in mixed(rng, 24))))

    counted.check()
