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
from headrace.runtime import logs, vitals
from headrace.runtime.interceptors import Activity
from headrace.runtime.server import Serving, StartFailed, run, serving, until_signal
from headrace.runtime.telemetry import telemetry
from headrace.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from headrace.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from headrace.worker.admin import AdminServicer
from headrace.worker.cpus import keep_to, parse
from headrace.worker.engine.interface import Engine
from headrace.worker.engine.load.refusals import LoadingError
from headrace.worker.faults import FaultPlan, FaultyEngine
from headrace.worker.service import RUN, SERVICES, WorkerServicer, described
from headrace.worker.settings import Settings
from headrace.worker.streams import Sessions

log = logging.getLogger("headrace.worker")


@dataclass(frozen=True)
class Worker:
    """A running worker: its server, and its sessions to look at once the model is loaded."""

    server: Serving
    sessions: Sessions


@asynccontextmanager
async def worker(
    settings: Settings, load: Callable[[], Engine], identity: str
) -> AsyncGenerator[Worker, None]:
    """Serve a model while the block runs; drain when it is left.

    load       makes the engine, on a thread; the server answers health checks meanwhile, not ready
    identity   names this worker in its batchers' logs
    """
    incarnation = secrets.randbits(63)
    servicer = WorkerServicer(identity, incarnation)
    activity = Activity()
    inside = AdminServicer(identity, incarnation, lambda: servicer.sessions, described, activity)

    def register(server: grpc.aio.Server) -> None:
        add_WorkerServiceServicer_to_server(servicer, server)
        add_AdminServiceServicer_to_server(inside, server)

    async with serving(
        register,
        (*SERVICES, *vitals.SERVICES),
        host=settings.host,
        port=settings.port,
        # What the servicer hands back at the end of the drain has to be sent as well.
        drain_seconds=settings.drain_seconds + 2,
        limits=settings.limits,
        aside=frozenset({RUN, vitals.INSPECT}),
        activity=activity,
        trace_context=settings.trace_context,
        drain=lambda: servicer.drain(settings.drain_seconds),
        ready=lambda: servicer.ready,
    ) as server:
        sessions = Sessions(
            await asyncio.to_thread(load),
            step_tokens=settings.tokens_per_step,
            prefix_cache=settings.prefix_cache,
            max_streams=settings.max_streams,
        )
        servicer.open(sessions)
        log.info("ready", extra={"model": sessions.model.name, "device": sessions.model.device})
        yield Worker(server, sessions)
    await asyncio.to_thread(sessions.close)


async def main(settings: Settings) -> None:
    """Serve until a signal comes."""
    identity = f"{socket.gethostname()}-{os.getpid()}"
    # A thread that reads weights cannot be interrupted, and until it is done there is nothing to finish.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, os._exit, 0)
    async with (
        telemetry("worker", instance=identity),
        worker(settings, lambda: _with_faults(_load(settings), settings.faults), identity),
    ):
        await until_signal()


def _with_faults(engine: Engine, faults: str) -> Engine:
    return FaultyEngine(engine, FaultPlan.parse(faults)) if faults else engine


def _load(settings: Settings) -> Engine:
    """The engine, loaded and warmed up. Runs on a thread, for it takes seconds."""
    if settings.fake:
        from headrace.worker.engine.echo import EchoEngine

        return EchoEngine(
            context_length=settings.context_length or 4096,
            max_running=settings.max_running,
            step_seconds=settings.fake_step_seconds,
        )
    # Imported here, for it costs seconds that `--help` and `--fake` need not wait.
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
            max_running=settings.max_running,
            step_tokens=settings.tokens_per_step,
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
    # Before there is any other thread, for they inherit it.
    try:
        keep_to(parse(settings.cpus))
    except (OSError, NotImplementedError) as error:
        raise SystemExit(f"cannot keep to CPUs {settings.cpus}: {error}") from error
    run(main(settings))
