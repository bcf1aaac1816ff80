"""The mesh as users run it: real processes and the two default models, in float32."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from headrace import models
from headrace.cli.launch.mesh import MeshSpec, Running, mesh


@pytest.fixture(scope="package")
async def real_mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Running, None]:
    """Run a router, and a batcher and a worker for each default model. The models are fetched first."""
    cache = models.cache_folder()
    for name in (models.SMALL, models.LARGE):
        models.resolve(name, cache)
    logs = tmp_path_factory.mktemp("logs")
    async with mesh(MeshSpec(cache=cache, log_dir=logs, dtype="float32")) as running:
        yield running
