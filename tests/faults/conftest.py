"""Fleets of processes for the fault tests, and rows of the table of faults."""

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
    """Mark all tests of this folder as fault tests."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Row]]:
    """Return a function that adds a row to the table of faults."""
    rows: list[Row] = []

    def add(scenario: str) -> Row:
        rows.append(Row(scenario))
        return rows[-1]

    yield add
    for one in rows:
        add_row(request.node, one.published(f"faults (seed {SEED})"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Return a generator seeded by the run's seed and the test's name: failures can be reproduced."""
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="session")
def long() -> bool:
    """Return whether HEADRACE_FAULTS_LONG=1 requests the long variants."""
    return LONG


@pytest.fixture
def fleets(tmp_path: Path) -> Callable[[Plan], AbstractAsyncContextManager[Fleet]]:
    """Return a function that runs a fleet for this test alone."""
    return lambda plan: fleet(plan, tmp_path)


@pytest.fixture(scope="package")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Fleet, None]:
    """Run two of each service, for all scenarios without special needs. Tests use it through `twins`."""
    plan = Plan(router_flags=("--poll-seconds", "0.25", "--stall-seconds", "2"))
    async with fleet(plan, tmp_path_factory.mktemp("twins")) as running:
        yield running


@pytest.fixture
async def twins(shared: Fleet) -> AsyncGenerator[Fleet, None]:
    """Return the shared fleet. All processes are running and ready before and after the test."""
    await shared.heal()
    yield shared
    await shared.heal()
