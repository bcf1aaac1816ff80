"""Start a worker: `python -m headrace.worker --help`."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from headrace.models import ModelUnavailable, cache_folder, resolve, tokenizer_fingerprint
from headrace.runtime import process_info
from headrace.runtime.security_setup import security
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.memory_reclaim import collection_paused
from headrace.runtime.serving.server import Serving, StartFailed, run, serving, until_signal
from headrace.runtime.telemetry import logs
from headrace.runtime.telemetry.scraping import scraping
from headrace.runtime.telemetry.setup import telemetry
from headrace.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from headrace.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from headrace.worker.admin import AdminServicer
from headrace.worker.cpus import bind, parse
from headrace.worker.engine.interface import Engine
from headrace.worker.engine.load.refusals import LoadingError
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.faults import FaultPlan, FaultyEngine
from headrace.worker.runner import Runner
from headrace.worker.sequences import SequenceKey
from headrace.worker.service import RUN, SERVICES, WorkerServicer, described
from headrace.worker.settings import Settings
from headrace.worker.streams import BatcherStreams

log = logging.getLogger("headrace.worker")


@dataclass(frozen=True)
class Worker:
    """A running worker with its model loaded: its server, and its batchers' streams."""

    server: Serving
    streams: BatcherStreams


@asynccontextmanager
async def worker(
    settings: Settings, load: Callable[[], Engine], identity: str
) -> AsyncGenerator[Worker, None]:
    """Serve a model while the block runs; drain when it is left.

    load       makes the engine, on a thread; meanwhile the server's health is not ready
    identity   identifies this worker in its batchers' logs
    """
    secured = security(settings, "worker")
    incarnation = secrets.randbits(63)
    servicer = WorkerServicer(identity, incarnation)
    calls = Calls(settings.limits, trace_context=settings.trace_context, guard=secured.guard)
    debug = AdminServicer(identity, incarnation, lambda: servicer.streams, described, calls.requests)

    def register(server: grpc.aio.Server) -> None:
        add_WorkerServiceServicer_to_server(servicer, server)
        add_AdminServiceServicer_to_server(debug, server)

    async with serving(
        register,
        (*SERVICES, *process_info.SERVICES),
        host=settings.host,
        port=settings.port,
        health_port=settings.health_port,
        mtls_port=settings.mtls_port,
        tls=secured.server,
        # Sequences that are handed off at the end of the drain must be sent as well.
        drain_seconds=settings.drain_seconds + 2,
        calls=calls,
        untracked=frozenset({RUN, process_info.INSPECT}),
        drain=lambda: servicer.drain(settings.drain_seconds),
        ready=lambda: servicer.ready,
    ) as server:
        runner: Runner[SequenceKey] = EngineLoop(
            await asyncio.to_thread(load),
            step_tokens=settings.tokens_per_step,
            prefix_cache=settings.prefix_cache,
        )
        streams = BatcherStreams(runner, max_streams=settings.max_batcher_streams, tier=settings.tier)
        servicer.open(streams)
        log.info("ready", extra={"model": runner.model.name, "device": runner.model.device})
        yield Worker(server, streams)
    await asyncio.to_thread(streams.stop)


async def main(settings: Settings) -> None:
    """Serve until a signal arrives."""
    identity = f"{socket.gethostname()}-{os.getpid()}"
    # A thread that loads weights cannot be interrupted, and before it is done no request is in flight.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, os._exit, 0)
    async with (
        telemetry("worker", instance=identity),
        scraping(settings.metrics_host, settings.metrics_port, "worker", identity),
        worker(settings, lambda: _with_faults(_load(settings), settings.faults), identity),
    ):
        await until_signal()


def _with_faults(engine: Engine, faults: str) -> Engine:
    return FaultyEngine(engine, FaultPlan.parse(faults)) if faults else engine


def _load(settings: Settings) -> Engine:
    """Load and warm up the engine. Runs on a thread, because it takes seconds."""
    if settings.fake:
        from headrace.worker.engine.echo import EchoEngine

        return EchoEngine(
            context_length=settings.context_length or 4096,
            max_running=settings.running_sequences,
            step_seconds=settings.fake_step_seconds,
        )
    # Imported here, because it takes seconds that `--help` and `--fake` do not need.
    with collection_paused():
        from headrace.worker.engine.load.loading import load_engine

    cache = Path(settings.cache) if settings.cache else cache_folder()
    log.info("loading", extra={"stage": "files", "model": settings.model})
    try:
        path = resolve(settings.model, cache)
        return load_engine(
            path,
            name=settings.model,
            cache=cache,
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.threads or None,
            context_length=settings.context_length or None,
            max_running=settings.running_sequences,
            step_tokens=settings.tokens_per_step,
            exact=settings.exact,
            allow_pickle=settings.allow_pickle,
            kv_memory=settings.kv_memory or None,
            tokenizer_fingerprint=tokenizer_fingerprint(path),
            progress=lambda stage: log.info("loading", extra={"stage": stage, "model": settings.model}),
            # `headrace up` shows lines with this field.
            warn=lambda text: log.warning(text, extra={"notice": True}),
        )
    except (ModelUnavailable, LoadingError) as error:
        raise StartFailed(str(error)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartFailed(f"cannot read {error.filename or settings.model}: {reason}") from error


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.worker")
    logs.configure("worker", settings.log_level)
    # Before any other thread is started, because threads inherit the binding.
    try:
        bind(parse(settings.cpus))
    except (OSError, NotImplementedError) as error:
        raise SystemExit(f"cannot bind to CPUs {settings.cpus}: {error}") from error
    run(main(settings))
