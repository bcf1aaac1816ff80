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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from headrace.models import ModelUnavailable, cache_folder, readable_as_folder, resolve, tokenizer_fingerprint
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
from headrace.worker.engine.load.refusals import LoadingError
from headrace.worker.faults import FaultPlan, FaultyRunner
from headrace.worker.runner import Runner
from headrace.worker.sequences import SequenceKey
from headrace.worker.service import RUN, SERVICES, WorkerServicer, described
from headrace.worker.settings import Settings
from headrace.worker.streams import BatcherStreams

if TYPE_CHECKING:
    from headrace.worker.engine.interface import Engine

log = logging.getLogger("headrace.worker")


@dataclass(frozen=True)
class Worker:
    """A running worker with its model loaded: its server, and its batchers' streams."""

    server: Serving
    streams: BatcherStreams


@asynccontextmanager
async def worker(
    settings: Settings, load: Callable[[], Runner[SequenceKey]], identity: str
) -> AsyncGenerator[Worker, None]:
    """Serve a model while the block runs; drain when it is left.

    load       makes the runner, on a thread; meanwhile the server's health is not ready
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
        runner = await asyncio.to_thread(load)
        streams = BatcherStreams(
            runner,
            max_streams=settings.max_batcher_streams,
            tier=settings.tier,
            delivery_seconds=settings.delivery_seconds,
        )
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
        worker(settings, lambda: with_faults(_load(settings), settings), identity),
    ):
        await until_signal()


def with_faults(runner: Runner[SequenceKey], settings: Settings) -> Runner[SequenceKey]:
    """Inject the faults that are set; usually none."""
    return FaultyRunner(runner, FaultPlan.parse(settings.faults)) if settings.faults else runner


def engine_loop(engine: Engine, settings: Settings, *, verifies_drafts: bool = False) -> Runner[SequenceKey]:
    """Run one of our own engines with the settings of the scheduler.

    verifies_drafts   whether the engine supports drafts
    """
    from headrace.worker.engine.plan.loop import EngineLoop

    return EngineLoop(
        engine,
        step_tokens=settings.tokens_per_step,
        prefix_cache=settings.prefix_cache,
        speculation=verifies_drafts and settings.speculation == "lookup",
    )


def _load(settings: Settings) -> Runner[SequenceKey]:
    """Load and warm up the engine. Runs on a thread, because it takes seconds.

    Each engine is imported only where it runs: environments have the dependencies of one of them.
    """
    if settings.engine == "echo":
        return _echo(settings)
    cache = Path(settings.cache) if settings.cache else cache_folder()
    _progress(settings, "files")
    try:
        return (_vllm if settings.engine == "vllm" else _torch)(settings, cache)
    except (ModelUnavailable, LoadingError) as error:
        raise StartFailed(str(error)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartFailed(f"cannot read {error.filename or settings.model}: {reason}") from error


def _echo(settings: Settings) -> Runner[SequenceKey]:
    from headrace.worker.engine.echo import EchoEngine

    engine = EchoEngine(
        context_length=settings.context_length or 4096,
        max_running=settings.running_sequences,
        step_seconds=settings.fake_step_seconds,
    )
    return engine_loop(engine, settings)


def _torch(settings: Settings, cache: Path) -> Runner[SequenceKey]:
    path = resolve(settings.model, cache)
    with collection_paused():
        if settings.device == "cpu":
            from headrace.worker.engine.cpu.kernels.compiling import compile_beside

            compile_beside()  # before torch is imported, which takes seconds
        from headrace.worker.engine.load.loading import load_engine

    engine = load_engine(
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
        gpu_memory_share=settings.gpu_memory_share,
        tokenizer_fingerprint=tokenizer_fingerprint(path),
        progress=partial(_progress, settings),
        warn=_warn,
    )
    return engine_loop(engine, settings, verifies_drafts=engine.verifies_drafts)


def _vllm(settings: Settings, cache: Path) -> Runner[SequenceKey]:
    from headrace.worker.vllm.loading import load_runner, require_vllm

    require_vllm()  # before gigabytes of weights are fetched in vain
    path = readable_as_folder(resolve(settings.model, cache), cache)
    return load_runner(
        settings,
        path,
        cache=cache,
        tokenizer_fingerprint=tokenizer_fingerprint(path),
        progress=partial(_progress, settings),
        warn=_warn,
    )


def _progress(settings: Settings, stage: str) -> None:
    log.info("loading", extra={"stage": stage, "model": settings.model})


def _warn(text: str) -> None:
    log.warning(text, extra={"notice": True})  # `headrace up` shows lines with this field


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.worker")
    logs.configure("worker", settings.log_level)
    # Before any other thread is started, because threads inherit the binding.
    try:
        bind(parse(settings.cpus))
    except (OSError, NotImplementedError) as error:
        raise SystemExit(f"cannot bind to CPUs {settings.cpus}: {error}") from error
    run(main(settings))
