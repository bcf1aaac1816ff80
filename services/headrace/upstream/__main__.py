"""Start an upstream: `python -m headrace.upstream --help`."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import grpc

from headrace.channel import is_loopback
from headrace.client import LIST_TIERS
from headrace.metrics import upstream as metrics
from headrace.metrics.rare import create_for_upstream
from headrace.multiplex.serving import METHOD as MULTIPLEX
from headrace.runtime import process_info
from headrace.runtime.breaker import BreakerState
from headrace.runtime.security.watched_file import BadFile
from headrace.runtime.security_setup import security
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.server import Serving, StartFailed, run, serving, until_signal
from headrace.runtime.telemetry import logs
from headrace.runtime.telemetry.scraping import scraping
from headrace.runtime.telemetry.setup import telemetry
from headrace.upstream.admin import AdminServicer
from headrace.upstream.answering import Answering
from headrace.upstream.api.terms import Terms
from headrace.upstream.asking import Asking
from headrace.upstream.attempt import AttemptLimits
from headrace.upstream.http.key import ApiKey
from headrace.upstream.http.proxy import Proxy, proxy_for
from headrace.upstream.http.session import http
from headrace.upstream.limits.per_minute import PerMinute
from headrace.upstream.limits.slots import Slots
from headrace.upstream.probing import Prober
from headrace.upstream.service import SERVICES, GenerationServicer, TokenizerServicer
from headrace.upstream.settings import Settings
from headrace.upstream.urls import UpstreamUrl, Urls
from headrace.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import add_RoutingServiceServicer_to_server
from headrace.v1.tokenizer_service_pb2_grpc import add_TokenizerServiceServicer_to_server

log = logging.getLogger("headrace.upstream")


@dataclass(frozen=True)
class RunningUpstream:
    """A running upstream: its server, its URLs, and what is in flight."""

    server: Serving
    urls: Urls
    slots: Slots
    answering: Answering


@asynccontextmanager
async def upstream(settings: Settings) -> AsyncGenerator[RunningUpstream, None]:
    """Serve one tier while the block runs; drain on leaving it. Raises StartFailed."""
    secured = security(settings, "batcher")
    key = _key(settings)
    create_for_upstream(settings.tier)
    urls = Urls(
        [
            UpstreamUrl(url, failures=settings.breaker_failures, pause=settings.breaker_seconds)
            for url in settings.urls
        ]
    )
    slots = Slots(settings.max_concurrent, settings.queue_limit, tier=settings.tier)
    per_minute = PerMinute(settings.requests_per_minute, settings.tokens_per_minute, time.monotonic())
    terms = Terms(tier=settings.tier, model=settings.model, api=settings.api, max_tokens=settings.max_tokens)
    limits = AttemptLimits(
        first_token_seconds=settings.first_token_seconds,
        stall_seconds=settings.stall_seconds,
        trace=settings.upstream_trace,
    )
    with ExitStack() as stack:
        for state, count in _counts(urls).items():
            stack.enter_context(metrics.URLS.of(tier=settings.tier, state=state).reading(count))
        async with (
            http(_proxies(settings), key, settings.connect_seconds) as connections,
            asyncio.TaskGroup() as tasks,
        ):
            asking = Asking(
                connections,
                urls,
                limits,
                tier=settings.tier,
                retries=settings.retries,
            )
            answering = Answering(
                asking, slots, per_minute, terms, max_unread_seconds=settings.max_unread_seconds
            )
            calls = Calls(settings.limits, trace_context=settings.trace_context, guard=secured.guard)
            servicer = GenerationServicer(answering, slots, urls, calls, settings)
            admin = AdminServicer(answering, slots, urls, calls.requests, settings)

            def register(server: grpc.aio.Server) -> None:
                add_GenerationServiceServicer_to_server(servicer, server)
                add_RoutingServiceServicer_to_server(servicer, server)
                add_TokenizerServiceServicer_to_server(TokenizerServicer(settings.tier), server)
                add_AdminServiceServicer_to_server(admin, server)

            prober = Prober(connections, urls, model=settings.model, seconds=settings.probe_seconds)
            running = [tasks.create_task(work()) for work in (prober.run, key.watch)]
            try:
                async with serving(
                    register,
                    (*SERVICES, *process_info.SERVICES),
                    host=settings.host,
                    port=settings.port,
                    health_port=settings.health_port,
                    mtls_port=settings.mtls_port,
                    tls=secured.server,
                    drain_seconds=settings.drain_seconds,
                    calls=calls,
                    untracked=frozenset({MULTIPLEX, process_info.INSPECT, LIST_TIERS}),
                    ready=lambda: bool(urls.usable(time.monotonic())),
                ) as server:
                    yield RunningUpstream(server, urls, slots, answering)
            finally:
                for task in running:
                    task.cancel()


def _key(settings: Settings) -> ApiKey:
    """Return the key, and warn if others could read it on its way. Raises StartFailed."""
    try:
        key = ApiKey(settings.api_key_file)
    except BadFile as error:
        raise StartFailed(
            f"HEADRACE_API_KEY_FILE (or --api-key-file) {settings.api_key_file}: {error}"
        ) from error
    for url in settings.urls:
        parts = urlsplit(url)
        if key.value and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            log.warning("the key is sent without TLS: others on the way could read it", extra={"url": url})
    return key


def _proxies(settings: Settings) -> dict[str, Proxy]:
    """Return the proxy of each URL. Raises StartFailed."""
    try:
        return {url: proxy_for(url) for url in settings.urls}
    except ValueError as error:
        raise StartFailed(str(error)) from error


def _counts(urls: Urls) -> dict[str, Callable[[], int]]:
    """Return functions that count the URLs in each state."""

    def count(state: str) -> int:
        now = time.monotonic()
        return sum(_state(url, now) == state for url in urls)

    return {state: partial(count, state) for state in ("ready", "open", "not_ready")}


def _state(url: UpstreamUrl, now: float) -> str:
    if url.usable(now):
        return "ready"
    return "open" if url.breaker.state(now) is BreakerState.OPEN else "not_ready"


async def main(settings: Settings) -> None:
    """Serve until a signal arrives."""
    identity = f"{settings.tier}-{socket.gethostname()}-{os.getpid()}"
    async with (
        telemetry("upstream", instance=identity),
        scraping(settings.metrics_host, settings.metrics_port, "upstream", identity),
        upstream(settings),
    ):
        await until_signal()


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.upstream")
    logs.configure("upstream", settings.log_level)
    run(main(settings), texts=True)
