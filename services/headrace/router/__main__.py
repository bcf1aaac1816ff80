"""Start a router: `python -m headrace.router --help`."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import grpc

from headrace.router import scorer
from headrace.router.service import SERVICES, RouterServicer
from headrace.router.settings import Settings
from headrace.router.tiers import Tiers
from headrace.runtime import logs
from headrace.runtime.server import Serving, run, serving, until_signal
from headrace.runtime.telemetry import telemetry
from headrace.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from headrace.v1.routing_service_pb2_grpc import add_RoutingServiceServicer_to_server


@asynccontextmanager
async def router(settings: Settings) -> AsyncGenerator[Serving, None]:
    """Serve the mesh while the block runs; drain when it is left."""
    tiers = Tiers(
        settings.tier_targets(),
        settings.tier_thresholds(),
        poll_seconds=settings.poll_seconds,
        stall_seconds=settings.stall_seconds,
    )
    servicer = RouterServicer(
        tiers,
        scorer.load(),
        default_deadline=settings.default_deadline,
        resume_seconds=settings.resume_seconds,
    )

    def register(server: grpc.aio.Server) -> None:
        add_GenerationServiceServicer_to_server(servicer, server)
        add_RoutingServiceServicer_to_server(servicer, server)

    async with (
        tiers.watching(),
        serving(
            register,
            SERVICES,
            host=settings.host,
            port=settings.port,
            drain_seconds=settings.drain_seconds,
            ready=lambda: tiers.any_healthy,
        ) as server,
    ):
        yield server


async def main(settings: Settings) -> None:
    """Serve until a signal comes."""
    async with (
        telemetry("router", instance=f"{socket.gethostname()}-{os.getpid()}"),
        router(settings),
    ):
        await until_signal()


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.router")
    logs.configure("router", settings.log_level)
    run(main(settings))
