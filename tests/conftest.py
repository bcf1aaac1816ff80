"""Fixtures that all tests share: an echo mesh, and telemetry kept in memory."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

# Read when Triton is imported: without a CUDA device, its interpreter runs our kernels on CPU tensors.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings
from opentelemetry import trace
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import DEFAULT_ON

from headrace.metrics.words import LABELS
from headrace.runtime.telemetry.collection import read_by
from headrace.runtime.telemetry.span_sampler import LinkedRoots
from headrace.runtime.telemetry.spans import ReadableExporter, Tracers
from tests import parallel
from tests.harness import Mesh, running_mesh
from tests.tables import Tables

# The global provider of spans can be set once in a process, so all tests share it.
_spans = InMemorySpanExporter()
_reader = InMemoryMetricReader()


# A slow machine must not fail a property test.
settings.register_profile("headrace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("headrace")


def pytest_configure(config: pytest.Config) -> None:
    """Record the spans and metrics of this process, and set up the run."""
    parallel.take_part(config)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Tables())
    exporter = ReadableExporter(_spans, Resource.create({}))
    trace.set_tracer_provider(Tracers(LinkedRoots(DEFAULT_ON), [SimpleSpanProcessor(exporter)]))
    read_by(_reader, Resource.get_empty())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes for `pytest -n auto`: one more than cores, as some tests wait."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def spans() -> InMemorySpanExporter:
    """Return the spans that have ended since the test started."""
    _spans.clear()
    return _spans


@pytest.fixture
def count() -> Callable[..., float]:
    """Return a function that reads a metric by our own labels: count("headrace.requests", outcome="ok").

    The services of a mesh in this process record the same series. It returns the sum of a counter, the value
    of a gauge, and the number of recordings of a histogram.
    """

    def read(name: str, **labels: str) -> float:
        data = _reader.get_metrics_data()
        total = 0.0
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    if metric.name != name:
                        continue
                    for point in metric.data.data_points:
                        attributes = dict(point.attributes or {})
                        if all(attributes.get(LABELS[key], "") == value for key, value in labels.items()):
                            total += point.count if hasattr(point, "count") else point.value
        return total

    return read


@pytest.fixture
async def mesh() -> AsyncGenerator[Mesh, None]:
    """Run a mesh of two tiers with echo engines."""
    async with running_mesh() as running:
        yield running
