"""Run several routers behind a name of the test, each at a loopback address of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from headrace.channel import open_channel
from headrace.client import Client
from headrace.endpoints.endpoints import Spread
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.runtime.serving.server import Serving
from headrace.worker.engine.echo import EchoEngine
from tests.harness import Mesh, eventually, running_mesh

RESOLVE_SECONDS = 0.05


@dataclass
class Router:
    """One router of the test. Set `stop` to drain it."""

    address: str
    server: Serving
    stop: asyncio.Event
    running: asyncio.Task[None]

    @property
    def in_flight(self) -> int:
        """Requests that it answers."""
        return self.server.requests.in_flight

    async def drain(self) -> None:
        """Stop it, and wait for the end of its requests."""
        self.stop.set()
        await self.running


@dataclass
class Routers:
    """The routers, and the addresses that their name has.

    settings    of each router
    published   what the test's resolver returns; an OSError is raised
    lookups     how often it was called
    """

    mesh: Mesh
    settings: dict[str, Any]
    published: list[str] | OSError = field(default_factory=list)
    lookups: int = 0
    started: list[Router] = field(default_factory=list)

    async def find(self) -> Sequence[str]:
        """Resolve the name."""
        self.lookups += 1
        if isinstance(self.published, OSError):
            raise self.published
        return list(self.published)

    async def start(self, *, tiers: str = "") -> Router:
        """Start a router at the next address, without publishing that."""
        host = f"127.0.0.{2 + len(self.started)}"
        known = ",".join(
            f"{name}=127.0.0.1:{parts.batcher.server.port}" for name, parts in self.mesh.tiers.items()
        )
        settings = Settings(
            host=host,
            port=self.started[0].server.port if self.started else 0,
            tiers=tiers or known,
            **{"drain_seconds": 30.0, "poll_seconds": 0.1, **self.settings},
        )
        started: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()

        async def run() -> None:
            async with router(settings) as server:
                started.set_result(server)
                await stop.wait()

        running = asyncio.create_task(run())
        server = await started
        self.started.append(Router(f"{host}:{server.port}", server, stop, running))
        if not tiers:
            await eventually(lambda: server.health.ready)
        return self.started[-1]

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncGenerator[Client, None]:
        """Open a client of the name."""
        spread = Spread(self.find, open_channel, RESOLVE_SECONDS)
        # The target that gRPC would resolve: nothing listens there.
        async with Client(open_channel("127.0.0.1:1"), spread=spread, **options) as client:
            yield client


@asynccontextmanager
async def routers(count: int, **settings: Any) -> AsyncGenerator[tuple[Routers, list[Router]], None]:
    """Run *count* routers, with their addresses published, before a tier whose steps take 10 ms."""
    engine = partial(EchoEngine, step_seconds=0.01, max_running=128)
    async with running_mesh("only", engine=engine) as mesh:
        made = Routers(mesh, settings)
        try:
            running = [await made.start() for _ in range(count)]
            made.published = [one.address for one in running]
            yield made, running
        finally:
            await asyncio.gather(*(one.drain() for one in made.started))
