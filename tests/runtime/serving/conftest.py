"""A mesh with small limits."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from headrace.worker.engine.echo import EchoEngine
from tests.harness import Mesh, running_mesh


@pytest.fixture(scope="module")
async def small() -> AsyncGenerator[Mesh, None]:
    """A mesh whose router has small limits."""
    limits = {"max_calls": 16, "max_message_megabytes": 1.0, "max_inflight_megabytes": 4.0}
    async with running_mesh(
        "only", engine=lambda: EchoEngine(step_seconds=0.02), router_settings=limits
    ) as mesh:
        yield mesh
