"""Export spans and metrics over OTLP when the standard OTEL_* variables ask for it.

Off when they are unset. Endpoint, headers, sampler, intervals and resource attributes are the SDK's to
read from the environment; see https://opentelemetry.io/docs/specs/otel/configuration/. Serving never
waits for the collector: export happens on threads of the SDK, and a collector that is down costs
dropped telemetry and a warning.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from opentelemetry import metrics, trace

_FLUSH_SECONDS = 2.0  # for the last spans, when the process ends


def wanted(signal: str) -> bool:
    """Whether the environment asks for OTLP export of *signal*, "traces" or "metrics"."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "otlp")
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get(
        f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"
    )
    return exporter == "otlp" and bool(endpoint)


@asynccontextmanager
async def telemetry(service: str, *, instance: str = "") -> AsyncGenerator[None, None]:
    """Set up export for this process; flush what is left on the way out.

    service    becomes service.name "headrace-<service>", unless OTEL_SERVICE_NAME says otherwise
    instance   becomes service.instance.id, to tell equal services apart
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
    if not (wanted("traces") or wanted("metrics")):
        return []
    # Imported here: a process that exports nothing need not load the SDK and its exporters.
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    names = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or f"headrace-{service}"}
    if instance:
        names["service.instance.id"] = instance
    resource = Resource.create(names)
    closing: list[Callable[[], object]] = []
    if wanted("traces"):
        tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(tracers)

        def close_tracers() -> None:
            tracers.force_flush(int(_FLUSH_SECONDS * 1000))
            tracers.shutdown()

        closing.append(close_tracers)
    if wanted("metrics"):
        meters = MeterProvider(
            resource=resource,
            metric_readers=[PeriodicExportingMetricReader(OTLPMetricExporter())],
            shutdown_on_exit=False,
        )
        metrics.set_meter_provider(meters)
        closing.append(lambda: meters.shutdown(timeout_millis=int(_FLUSH_SECONDS * 1000)))
    return closing
