"""Export spans and metrics when the standard OTEL_* variables ask for it.

Off when they are unset. `exporting` decides what they ask for; headers, sampler, intervals and resource
attributes are the SDK's to read. Serving never waits for the collector: export happens on threads of the SDK,
and a collector that is down costs dropped telemetry and a warning. What is not supported is one line of the
log, and the rest goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics, trace

from headrace.runtime import exporting

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 2.0  # for the last spans, when the process ends


def wanted(signal: exporting.Signal) -> bool:
    """Whether the environment asks for export of *signal*."""
    return bool(exporting.plan(signal).names)


@asynccontextmanager
async def telemetry(service: str, *, instance: str = "") -> AsyncGenerator[None, None]:
    """Set up export for this process; flush what is left on the way out.

    service    becomes service.name "headrace-<service>"
    instance   becomes service.instance.id, to tell equal services apart

    OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override both.
    """
    closing = _start(service, instance)
    try:
        yield
    finally:
        if closing:
            await _within(_FLUSH_SECONDS, closing)


async def _within(seconds: float, closing: list[Callable[[], object]]) -> None:
    """Call them all, for at most so long.

    Exporters block while a collector is down, and the process ends all the same: on threads of its own,
    for the event loop would wait for those of its executor.
    """
    loop, left = asyncio.get_running_loop(), asyncio.Semaphore(0)

    def call(close: Callable[[], object]) -> None:
        close()
        with contextlib.suppress(RuntimeError):  # the loop has not waited for us
            loop.call_soon_threadsafe(left.release)

    for close in closing:
        threading.Thread(target=call, args=(close,), daemon=True).start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for _ in closing:
                await left.acquire()


def _start(service: str, instance: str) -> list[Callable[[], object]]:
    """Set up what is available, and return what ends it; problems go to the log, a line each."""
    problems, closing = exporting.ignored(), list[Callable[[], object]]()
    for signal, set_up in _SIGNALS.items():
        plan, made = exporting.plan(signal), []
        problems += plan.problems
        # The SDK and exporters raise what they like at values of OTEL_* that they cannot use.
        for name in plan.names:
            try:
                made.append(exporting.exporter(signal, name))
            except Exception as error:
                problems.append(f"{signal} are not exported by {name}: {type(error).__name__}: {error}")
        try:
            closing += set_up(made, service, instance) if made else []
        except Exception as error:
            problems.append(f"{signal} are not exported: {type(error).__name__}: {error}")
    for line in problems:
        log.warning("telemetry: %s", line)
    return closing


# The SDK is imported here and below: a process that exports nothing need not load it and its exporters.


def _resource(service: str, instance: str) -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    names = {"service.name": f"headrace-{service}"} | ({"service.instance.id": instance} if instance else {})
    # Resource.create prefers what it is given to what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say.
    return Resource.create({**names, **OTELResourceDetector().detect().attributes})


def _trace(exporters: Sequence[Any], service: str, instance: str) -> list[Callable[[], object]]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from headrace.runtime.sampling import LinkedRoots

    tracers = TracerProvider(resource=_resource(service, instance), shutdown_on_exit=False)
    tracers.sampler = LinkedRoots(tracers.sampler)
    processors = [BatchSpanProcessor(exporter) for exporter in exporters]
    for processor in processors:
        tracers.add_span_processor(processor)
    trace.set_tracer_provider(tracers)

    def close(processor: Any) -> None:
        processor.force_flush(int(_FLUSH_SECONDS * 1000))
        processor.shutdown()

    # Each by itself: one whose collector is down does not keep the others from their last spans.
    return [functools.partial(close, processor) for processor in processors]


def _measure(exporters: Sequence[Any], service: str, instance: str) -> list[Callable[[], object]]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader

    readers: list[Any] = [
        one if isinstance(one, MetricReader) else PeriodicExportingMetricReader(one) for one in exporters
    ]
    meters = MeterProvider(
        resource=_resource(service, instance), metric_readers=readers, shutdown_on_exit=False
    )
    metrics.set_meter_provider(meters)
    milliseconds = _FLUSH_SECONDS * 1000
    return [functools.partial(reader.shutdown, timeout_millis=milliseconds) for reader in readers]


_SIGNALS: dict[exporting.Signal, Callable[[Sequence[Any], str, str], list[Callable[[], object]]]] = {
    "traces": _trace,
    "metrics": _measure,
}
