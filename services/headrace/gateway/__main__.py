"""Start a gateway: `python -m headrace.gateway --help`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvicorn

from headrace.client import connect
from headrace.gateway.app import routes
from headrace.gateway.settings import Settings
from headrace.runtime.serving.server import run, until_signal
from headrace.runtime.telemetry import logs

log = logging.getLogger("headrace.gateway")


@dataclass(frozen=True)
class RunningGateway:
    """A running gateway, and the port where it listens."""

    port: int


@asynccontextmanager
async def gateway(settings: Settings) -> AsyncGenerator[RunningGateway, None]:
    """Serve while the block runs; drain on leaving it."""
    async with connect(settings.router) as client:
        config = uvicorn.Config(
            routes(client), host=settings.host, port=settings.port, log_config=None, lifespan="off"
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield RunningGateway(server.servers[0].sockets[0].getsockname()[1])
        finally:
            server.should_exit = True
            await serving


async def main(settings: Settings) -> None:
    """Serve until a signal arrives."""
    async with gateway(settings):
        await until_signal()


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.gateway")
    logs.configure("gateway", settings.log_level)
    run(main(settings), texts=True)
