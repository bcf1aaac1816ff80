"""One table for all scenarios, printed at the end and kept in build/."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.faults.fleet import Fleet, Plan, fleet
from tests.faults.tally import Row
from tests.tables import add_row

SEED = int(os.environ.get("HEADRACE_FAULTS_SEED", "0")) or 20261123
LONG = bool(os.environ.get("HEADRACE_FAULTS_LONG"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is a fault test; the long ones run when they are asked for."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Row]]:
    """Opens a row of the table."""
    rows: list[Row] = []

    def opened(scenario: str) -> Row:
        rows.append(Row(scenario))
        return rows[-1]

    yield opened
    for one in rows:
        add_row(request.node, one.published(f"faults (seed {SEED})"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Seeded by the run's seed and the test's name: a test that failed fails again alone."""
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="session")
def long() -> bool:
    """Whether the long variants are asked for, by HEADRACE_FAULTS_LONG=1."""
    return LONG


@pytest.fixture
def fleets(tmp_path: Path) -> Callable[[Plan], AbstractAsyncContextManager[Fleet]]:
    """Starts fleets of this test's own."""
    return lambda plan: fleet(plan, tmp_path)


@pytest.fixture(scope="package")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Fleet, None]:
    """Two of each service, for all scenarios that need no special ones; use it through `twins`."""
    plan = Plan(router_flags=("--poll-seconds", "0.25", "--stall-seconds", "2"))
    async with fleet(plan, tmp_path_factory.mktemp("twins")) as running:
        yield running


@pytest.fixture
async def twins(shared: Fleet) -> AsyncGenerator[Fleet, None]:
    """The shared fleet, all of it running and ready before and after."""
    await shared.heal()
    yield shared
    await shared.heal()
