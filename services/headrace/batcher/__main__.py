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

from headrace import errors
from headrace.batcher.admin import AdminServicer
from headrace.batcher.answering import Answering
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.intake.encoding import Encoder
from headrace.batcher.intake.grammars import GrammarCheck
from headrace.batcher.intake.intake import Intake
from headrace.batcher.links.pool import WorkerPool
from headrace.batcher.service import SERVICES, GenerationServicer
from headrace.batcher.settings import Settings
from headrace.batcher.text.generation_defaults import recommended_sampling
from headrace.batcher.text.tokens import ByteTokenizer, Tokenizer, load_tokenizer
from headrace.batcher.tokenizer_service import SERVICES as TOKENIZER_SERVICES
from headrace.batcher.tokenizer_service import TokenizerServicer
from headrace.batcher.turns import Turn
from headrace.batcher.waiting.queue import RequestQueue
from headrace.batcher.waiting.window import Window
from headrace.client import LIST_TIERS
from headrace.models import ModelUnavailable, cache_folder, resolve
from headrace.multiplex.serving import METHOD as MULTIPLEX
from headrace.runtime import process_info
from headrace.runtime.security_setup import security
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.memory_reclaim import collection_paused
from headrace.runtime.serving.server import Serving, StartFailed, run, serving, until_signal
from headrace.runtime.telemetry import logs
from headrace.runtime.telemetry.scraping import scraping
from headrace.runtime.telemetry.setup import telemetry
from headrace.template_arguments import Arguments
from headrace.v1 import generation_pb2 as pb
from headrace.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import add_RoutingServiceServicer_to_server
from headrace.v1.tokenizer_service_pb2_grpc import add_TokenizerServiceServicer_to_server

log = logging.getLogger("headrace.batcher")


@dataclass(frozen=True)
class RunningBatcher:
    """A running batcher: its server, its coalescer, its intake and its tokenizer service."""

    server: Serving
    coalescer: Coalescer
    intake: Intake
    tokenizers: TokenizerServicer


@asynccontextmanager
async def batcher(
    settings: Settings, tokenizer: Tokenizer, identity: str, defaults: pb.Sampling | None = None
) -> AsyncGenerator[RunningBatcher, None]:
    """Serve one tier while the block runs; drain on leaving it.

    identity   the name of this batcher in its workers' logs
    defaults   values of sampling fields that a request leaves out
    """
    secured = security(settings, "batcher")
    pool = WorkerPool(
        settings.worker_targets,
        fingerprint=tokenizer.fingerprint,
        batcher_id=identity,
        tls=secured.calls,
    )
    coalescer = Coalescer(
        pool,
        RequestQueue(
            settings.queue_limit,
            tier=settings.tier,
            ageing=settings.ageing_seconds,
            quantum=settings.quantum_tokens,
        ),
        Window(size=settings.batch_size, tokens=settings.batch_tokens, linger=settings.linger),
        tier=settings.tier,
        failover_seconds=settings.failover_seconds,
        max_unread_seconds=settings.max_unread_seconds,
        share_prefixes=settings.share_prefixes,
    )
    encoder = Encoder(tokenizer, settings.default_template_arguments)
    grammars = GrammarCheck(tokenizer)
    with (
        Intake(
            coalescer,
            encoder,
            grammars,
            tier=settings.tier,
            max_tokens=settings.max_tokens,
            max_unread_tokens=settings.max_unread_tokens,
            max_bytes=settings.intake_bytes,
            ageing=settings.ageing_seconds,
            defaults=defaults,
        ) as intake,
        TokenizerServicer(tokenizer, encoder, intake.limits, max_bytes=settings.intake_bytes) as tokenizers,
    ):
        answering = Answering(
            coalescer, intake, tokenizer, tier=settings.tier, trace_content=settings.trace_content
        )
        calls = Calls(settings.limits, trace_context=settings.trace_context, guard=secured.guard)
        servicer = GenerationServicer(
            answering, coalescer, intake, calls, tier=settings.tier, max_tokens=settings.max_tokens
        )
        admin = AdminServicer(coalescer, intake, calls.requests, tier=settings.tier)

        def register(server: grpc.aio.Server) -> None:
            add_GenerationServiceServicer_to_server(servicer, server)
            add_RoutingServiceServicer_to_server(servicer, server)
            add_TokenizerServiceServicer_to_server(tokenizers, server)
            add_AdminServiceServicer_to_server(admin, server)

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(pool.run(coalescer)), tasks.create_task(coalescer.run())]
            if not settings.fake:  # in good time: reading the vocabulary of a model takes a second
                running.append(tasks.create_task(asyncio.to_thread(grammars.start)))
            try:
                async with serving(
                    register,
                    (*SERVICES, *TOKENIZER_SERVICES, *process_info.SERVICES),
                    host=settings.host,
                    port=settings.port,
                    health_port=settings.health_port,
                    mtls_port=settings.mtls_port,
                    tls=secured.server,
                    drain_seconds=settings.drain_seconds,
                    calls=calls,
                    untracked=frozenset({MULTIPLEX, process_info.INSPECT, LIST_TIERS}),
                    ready=lambda: bool(pool.ready()),
                ) as server:
                    yield RunningBatcher(server, coalescer, intake, tokenizers)
            finally:
                for task in running:
                    task.cancel()


async def main(settings: Settings) -> None:
    """Serve until a signal arrives."""
    identity = f"{settings.tier}-{socket.gethostname()}-{os.getpid()}"
    log.info("loading", extra={"stage": "tokenizer", "model": settings.model or "echo"})
    tokenizer, defaults = await asyncio.to_thread(_load, settings)
    async with (
        telemetry("batcher", instance=identity),
        scraping(settings.metrics_host, settings.metrics_port, "batcher", identity),
        batcher(settings, tokenizer, identity, defaults),
    ):
        await until_signal()


def _load(settings: Settings) -> tuple[Tokenizer, pb.Sampling]:
    """Return the tokenizer, and the model's recommended sampling fields if the settings ask for them."""
    if settings.fake:
        return (
            ByteTokenizer(tool_format=settings.tool_format, reasoning=settings.reasoning),
            pb.Sampling(),
        )
    # Each prompt is tokenised on its lane's thread: in the library's own pool, long ones would delay short
    # ones.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cache = Path(settings.cache) if settings.cache else cache_folder()
    try:
        path = resolve(settings.model, cache, weights=False)
        recommended = recommended_sampling(path) if settings.generation_config == "auto" else pb.Sampling()
        with collection_paused():
            tokenizer = load_tokenizer(
                path, cache, tool_format=settings.tool_format, reasoning=settings.reasoning
            )
    except ModelUnavailable as error:
        raise StartFailed(str(error)) from error
    _check_template_arguments(tokenizer, settings.default_template_arguments)
    return tokenizer, recommended


def _check_template_arguments(tokenizer: Tokenizer, arguments: Arguments) -> None:
    """Try the tier's template arguments on a short chat. Raises StartFailed."""
    if not arguments:
        return
    try:
        tokenizer.encode_chat([Turn("user", "Hello!")], arguments=arguments)
    except errors.InvalidRequest as error:
        raise StartFailed(
            f"HEADRACE_TEMPLATE_ARGUMENTS (or --template-arguments): {error.message}"
        ) from error


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.batcher")
    logs.configure("batcher", settings.log_level)
    run(main(settings), texts=True)
