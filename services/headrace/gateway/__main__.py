"""Start a gateway: `python -m headrace.gateway --help`."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from headrace.bearer import BadToken, check_plaintext
from headrace.channel import open_channel
from headrace.client import connect
from headrace.gateway.app import application
from headrace.gateway.health import RouterHealth
from headrace.gateway.http.endpoint import HttpService
from headrace.gateway.http.https import Https
from headrace.gateway.http.server import listening
from headrace.gateway.settings import Settings
from headrace.runtime.security_setup import guard
from headrace.runtime.serving.memory_reclaim import freeze_loaded_objects
from headrace.runtime.serving.processes import prefork
from headrace.runtime.serving.server import StartFailed, run, until_signal
from headrace.runtime.telemetry import logs
from headrace.runtime.telemetry.scraping import scraping, text_of
from headrace.runtime.telemetry.setup import telemetry
from headrace.tls.files import BadTls, TlsReader


@dataclass(frozen=True)
class RunningGateway:
    """A running gateway.

    port     where it listens
    http     its requests
    router   whether the router serves
    """

    port: int
    http: HttpService
    router: RouterHealth


@asynccontextmanager
async def gateway(settings: Settings, instance: str = "gateway") -> AsyncGenerator[RunningGateway, None]:
    """Serve while the block runs; drain when it is left.

    instance   name of this process, in its metrics

    Raises StartFailed, in a group if it cannot listen.
    """
    http = HttpService(
        settings.limits,
        guard(settings, "gateway"),
        trace_context=settings.trace_context,
        forward_authorization=settings.reads_tokens,
    )
    https = None
    if settings.https_cert is not None and settings.https_key is not None:
        https = Https(settings.https_cert, settings.https_key)
    files = settings.tls_files
    if settings.reads_tokens and files is None:
        _check_plaintext(settings)
    try:
        reader = None if files is None else TlsReader(files)
    except BadTls as error:
        raise StartFailed(f"TLS: {error}") from error
    text = await asyncio.to_thread(text_of, "gateway", instance)
    name = settings.router_server_name
    async with (
        connect(
            settings.router,
            ca=settings.tls_ca,
            cert=settings.tls_cert,
            key=settings.tls_key,
            server_name=name,
        ) as client,
        open_channel(settings.router, tls=reader, server_name=name) as probes,
        asyncio.TaskGroup() as tasks,
    ):
        router = RouterHealth(probes, http.requests)
        working = [tasks.create_task(work()) for work in (router.poll, http.ping, http.guard.maintain)]
        try:
            async with listening(
                application(client, http, router, text, settings.origins, settings.hosts),
                host=settings.host,
                port=settings.port,
                limits=settings.limits,
                requests=http.requests,
                drain_seconds=settings.drain_seconds,
                share_port=settings.processes > 1,
                https=https,
            ) as server:
                yield RunningGateway(server.port, http, router)
        finally:
            for task in working:
                task.cancel()


def _check_plaintext(settings: Settings) -> None:
    try:
        check_plaintext(settings.router, allowed=settings.router_plaintext_tokens)
    except BadToken as error:
        raise StartFailed(f"--router: {error}; set --tls-ca for TLS, or --router-plaintext-tokens") from error


async def main(settings: Settings, number: int = 0) -> None:
    """Serve until a signal is received.

    number   of this process among --processes
    """
    identity = f"{socket.gethostname()}-{os.getpid()}"
    # Each of several processes has an endpoint of its own, because each has metrics of its own.
    port = settings.metrics_port and settings.metrics_port + number
    async with (
        telemetry("gateway", instance=identity),
        scraping(settings.metrics_host, port, "gateway", identity),
        gateway(settings, identity),
    ):
        await until_signal()


def start(settings: Settings) -> None:
    """Run a gateway with one process or several, until a signal is received."""
    if settings.processes == 1:
        run(main(settings), texts=True)
        return
    freeze_loaded_objects()  # so that collections do not unshare their memory
    number, port = prefork(settings.processes, settings.host, settings.port)
    run(main(settings.model_copy(update={"port": port}), number), texts=True)


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.gateway")
    logs.configure("gateway", settings.log_level)
    start(settings)
