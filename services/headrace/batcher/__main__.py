"""Start a batcher: `python -m headrace.batcher --help`."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from headrace.batcher.admin import AdminServicer
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.intake.intake import Intake
from headrace.batcher.links.pool import WorkerPool
from headrace.batcher.service import SERVICES, GenerationServicer
from headrace.batcher.settings import Settings
from headrace.batcher.text.generation_defaults import recommended_sampling
from headrace.batcher.text.tokens import ByteTokenizer, Tokenizer, load_tokenizer
from headrace.batcher.waiting.queue import JobQueue
from headrace.batcher.waiting.window import Window
from headrace.client import LIST_TIERS
from headrace.models import ModelUnavailable, cache_folder, resolve
from headrace.runtime import logs, vitals
from headrace.runtime.interceptors import Activity
from headrace.runtime.server import Serving, StartFailed, run, serving, until_signal
from headrace.runtime.telemetry import telemetry
from headrace.v1 import generation_pb2 as pb
from headrace.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import add_RoutingServiceServicer_to_server

log = logging.getLogger("headrace.batcher")


@dataclass(frozen=True)
class Batcher:
    """A running batcher: its server, its coalescer and its intake."""

    server: Serving
    coalescer: Coalescer
    intake: Intake


@asynccontextmanager
async def batcher(
    settings: Settings, tokenizer: Tokenizer, identity: str, defaults: pb.Sampling | None = None
) -> AsyncGenerator[Batcher, None]:
    """Serve one tier while the block runs; drain when it is left.

    identity   names this batcher in its workers' logs
    defaults   sampling fields that a request has unless it sets them
    """
    pool = WorkerPool(settings.worker_targets, fingerprint=tokenizer.fingerprint, batcher_id=identity)
    coalescer = Coalescer(
        pool,
        JobQueue(settings.queue_limit, ageing=settings.ageing_seconds, quantum=settings.quantum_tokens),
        Window(size=settings.batch_size, tokens=settings.batch_tokens, linger=settings.linger),
        tier=settings.tier,
        failover_seconds=settings.failover_seconds,
        unread_seconds=settings.unread_seconds,
        share_prefixes=settings.share_prefixes,
    )
    with Intake(
        coalescer,
        tokenizer,
        tier=settings.tier,
        max_tokens=settings.max_tokens,
        unread_limit=settings.unread_limit,
        most_bytes=settings.intake_bytes,
        ageing=settings.ageing_seconds,
        defaults=defaults,
    ) as intake:
        servicer = GenerationServicer(
            coalescer, intake, tokenizer, tier=settings.tier, max_tokens=settings.max_tokens
        )
        activity = Activity()
        inside = AdminServicer(coalescer, intake, activity, tier=settings.tier)

        def register(server: grpc.aio.Server) -> None:
            add_GenerationServiceServicer_to_server(servicer, server)
            add_RoutingServiceServicer_to_server(servicer, server)
            add_AdminServiceServicer_to_server(inside, server)

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(pool.run(coalescer)), tasks.create_task(coalescer.run())]
            try:
                async with serving(
                    register,
                    (*SERVICES, *vitals.SERVICES),
                    host=settings.host,
                    port=settings.port,
                    drain_seconds=settings.drain_seconds,
                    limits=settings.limits,
                    aside=frozenset({vitals.INSPECT, LIST_TIERS}),
                    activity=activity,
                    trace_context=settings.trace_context,
                    ready=lambda: bool(pool.ready()),
                ) as server:
                    yield Batcher(server, coalescer, intake)
            finally:
                for task in running:
                    task.cancel()


async def main(settings: Settings) -> None:
    """Serve until a signal comes."""
    identity = f"{settings.tier}-{socket.gethostname()}-{os.getpid()}"
    log.info("loading", extra={"stage": "tokenizer", "model": settings.model or "echo"})
    tokenizer, defaults = await asyncio.to_thread(_load, settings)
    async with telemetry("batcher", instance=identity), batcher(settings, tokenizer, identity, defaults):
        await until_signal()


def _load(settings: Settings) -> tuple[Tokenizer, pb.Sampling]:
    """The tokenizer, and what the model recommends for sampling if that is wanted."""
    if settings.fake:
        return ByteTokenizer(), pb.Sampling()
    # Each prompt on its lane's thread: in the pool of the library, long ones would hold up short ones.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cache = Path(settings.cache) if settings.cache else cache_folder()
    try:
        path = resolve(settings.model, cache, weights=False)
        recommended = recommended_sampling(path) if settings.generation_config == "auto" else pb.Sampling()
        return load_tokenizer(path, cache), recommended
    except ModelUnavailable as error:
        raise StartFailed(str(error)) from error


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.batcher")
    logs.configure("batcher", settings.log_level)
    run(main(settings), texts=True)
