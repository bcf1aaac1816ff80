"""A mesh with small limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeAlias

import pytest
from opentelemetry.sdk.metrics.export import HistogramDataPoint

from headrace.worker.engine.echo import EchoEngine
from tests.conftest import _reader
from tests.harness import Mesh, running_mesh


@pytest.fixture(scope="module")
async def small() -> AsyncGenerator[Mesh, None]:
    """A mesh whose router has small limits."""
    limits = {"max_calls": 16, "max_message_megabytes": 1.0, "max_inflight_megabytes": 4.0}
    async with running_mesh(
        "only", engine=lambda: EchoEngine(step_seconds=0.02), router_settings=limits
    ) as mesh:
        yield mesh


# Returns the number of calls in a metric of calls, by method, status and error type.
Durations: TypeAlias = Callable[[str], Counter[tuple[str, str, str]]]


@pytest.fixture
def durations() -> Durations:
    """Return a function that counts the calls in `rpc.server.call.duration` or `rpc.client.call.duration`."""

    def read(name: str) -> Counter[tuple[str, str, str]]:
        counts: Counter[tuple[str, str, str]] = Counter()
        data = _reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points if metric.name == name else ():
                        labels: Any = point.attributes or {}
                        assert labels["rpc.system.name"] == "grpc"
                        key = (labels["rpc.method"], labels["rpc.status_code"], labels.get("error.type", ""))
                        assert isinstance(point, HistogramDataPoint)
                        counts[key] += point.count
        return counts

    return read
