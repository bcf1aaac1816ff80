"""Export spans and metrics if the standard OTEL_* variables are set.

`exporters` selects the exporters; the SDK reads headers, sampler, intervals and resource attributes. Requests
never wait for the collector: the SDK exports on its own threads, and while a collector is down, telemetry is
dropped with a warning. Each unsupported setting is reported in one line of the log, and the rest takes
effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from headrace.runtime.telemetry import exporters
from headrace.runtime.telemetry.vitals import measuring

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 2.0  # at the end of the process


def wanted(signal: exporters.Signal) -> bool:
    """Return whether the environment configures an exporter for *signal*."""
    return bool(exporters.plan(signal).names)


@asynccontextmanager
async def telemetry(service: str, *, instance: str = "") -> AsyncGenerator[None, None]:
    """Set up export for this process, and flush when the block exits.

    service    sets service.name to "headrace-<service>"
    instance   sets service.instance.id

    OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override both.
    """
    closing = _start(service, instance)
    try:
        async with measuring():
            yield
    finally:
        if closing:
            await _within(_FLUSH_SECONDS, closing)


async def _within(seconds: float, closing: list[Callable[[], object]]) -> None:
    """Call all of *closing* on threads, and wait at most *seconds* for them.

    Exporters block while a collector is down, and the process must end nevertheless. The threads are daemons
    because the event loop would wait for threads of its executor.
    """
    loop, left = asyncio.get_running_loop(), asyncio.Semaphore(0)

    def call(close: Callable[[], object]) -> None:
        close()
        with contextlib.suppress(RuntimeError):  # the loop is closed: it did not wait
            loop.call_soon_threadsafe(left.release)

    for close in closing:
        threading.Thread(target=call, args=(close,), daemon=True).start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for _ in closing:
                await left.acquire()


def _start(service: str, instance: str) -> list[Callable[[], object]]:
    """Set up the available exporters and return the functions that close them; log each problem in a line."""
    problems, closing = exporters.unsupported(), list[Callable[[], object]]()
    for signal, set_up in _SIGNALS.items():
        plan, made = exporters.plan(signal), []
        problems += plan.problems
        # The SDK and exporters raise arbitrary exceptions for invalid values of OTEL_*.
        for name in plan.names:
            try:
                made.append(exporters.create(signal, name))
            except Exception as error:
                problems.append(f"{signal} are not exported by {name}: {type(error).__name__}: {error}")
        try:
            closing += set_up(made, service, instance) if made else []
        except Exception as error:
            problems.append(f"{signal} are not exported: {type(error).__name__}: {error}")
    for line in problems:
        log.warning("telemetry: %s", line)
    return closing


# The SDK is imported inside the functions below: a process that exports nothing does not load it.


def resource(service: str, instance: str) -> Resource:
    """Return the resource that describes this process; OTEL_* variables take precedence."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    names = {"service.name": f"headrace-{service}", "service.version": _version()}
    if instance:
        names["service.instance.id"] = instance
    # Resource.create prefers its argument to OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
    return Resource.create({**names, **OTELResourceDetector().detect().attributes})


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:  # the sources are on PYTHONPATH
        return "unknown"


def _trace(made: Sequence[Any], service: str, instance: str) -> list[Callable[[], object]]:
    from headrace.runtime.telemetry.tracing import set_up

    return set_up(made, resource(service, instance), _FLUSH_SECONDS)


def _measure(made: Sequence[Any], service: str, instance: str) -> list[Callable[[], object]]:
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader

    from headrace.runtime.telemetry.collection import read_by

    described, closing = resource(service, instance), list[Callable[[], object]]()
    for one in made:
        preferences = getattr(one, "_preferred_temporality", None)
        reader = one if isinstance(one, MetricReader) else PeriodicExportingMetricReader(one)
        read_by(reader, described, preferences=preferences)
        closing.append(functools.partial(reader.shutdown, timeout_millis=_FLUSH_SECONDS * 1000))
    return closing


_SIGNALS: dict[exporters.Signal, Callable[[Sequence[Any], str, str], list[Callable[[], object]]]] = {
    "traces": _trace,
    "metrics": _measure,
}
