"""A gateway in front of a fake router, for the tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from tests.gateway.fake_router import Edge, edge


@pytest.fixture(scope="session")
async def running() -> AsyncGenerator[Edge, None]:
    """A gateway in front of a fake router, for all tests of this folder."""
    async with edge() as started:
        yield started


@pytest.fixture
async def plain(running: Edge) -> Edge:
    """A gateway whose router answers every request the same way, until the test changes it."""
    await running.router.renew(running.chat)
    return running
