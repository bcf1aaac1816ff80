"""Run routers, batchers and workers on loopback as processes that tests kill, stop and restart."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.cli.launch.mesh import reserved_ports
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from tests.faults import secured
from tests.faults.secured import connect, open_channel

HOST = "127.0.0.1"
START_SECONDS = 180.0  # generous, for busy machines


@dataclass
class Child:
    """One service as a process. It keeps its port over restarts."""

    name: str
    module: str
    flags: Sequence[str]
    port: int
    log: Path
    process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        """The address on which it listens."""
        return f"{HOST}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether the process exists; a stopped process does."""
        return self.process is not None and self.process.returncode is None

    @property
    def pid(self) -> int:
        """The id of the current process."""
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        """Start the process. It ends when this process ends."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "headrace.cli.launch.child", str(os.getpid()), self.module),
                *("--host", HOST, "--port", str(self.port), *self.flags),
                *secured.flags(self.name.rstrip("0123456789")),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    async def kill(self) -> None:
        """Kill the process with SIGKILL and wait for its end."""
        if self.alive:
            self.send(signal.SIGKILL)
        await self.gone()

    async def gone(self) -> int:
        """Wait until the process has ended. Returns its exit code."""
        assert self.process is not None
        return await self.process.wait()

    async def ready(self, *, seconds: float = START_SECONDS) -> None:
        """Wait until the service reports that it is ready."""
        began = time.monotonic()
        async with open_channel(self.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while True:
                with suppress(grpc.aio.AioRpcError):
                    asked = health_pb2.HealthCheckRequest(service="readiness")
                    reply = await stub.Check(asked, timeout=2)
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                if not self.alive:
                    raise AssertionError(f"{self.name} ended by itself: {self.tail()}")
                if time.monotonic() - began > seconds:
                    raise AssertionError(f"{self.name} is not ready after {seconds:g} s: {self.tail()}")
                await asyncio.sleep(0.05)

    async def restart(self) -> None:
        """Start the process again and wait until it is ready."""
        await self.start()
        await self.ready()

    async def heal(self) -> None:
        """Continue or restart the process, and wait until it is ready."""
        if self.alive:
            self.send(signal.SIGCONT)
        else:
            await self.start()
        await self.ready()

    def tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(errors="replace")[-2000:]

    @property
    def memory(self) -> int:
        """Resident memory in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def inspect(self) -> admin.InspectResponse:
        """Call the service's Inspect RPC."""
        async with open_channel(self.address) as channel:
            return await AdminServiceStub(channel).Inspect(admin.InspectRequest(), timeout=30)


@dataclass
class Fleet:
    """The processes of a mesh."""

    workers: list[Child] = field(default_factory=list)
    batchers: list[Child] = field(default_factory=list)
    routers: list[Child] = field(default_factory=list)

    @property
    def children(self) -> list[Child]:
        """All processes, workers first."""
        return [*self.workers, *self.batchers, *self.routers]

    @property
    def target(self) -> str:
        """The routers, as one gRPC target."""
        return f"ipv4:{','.join(router.address for router in self.routers)}"

    async def loads(self) -> list[routing.TierLoad]:
        """Return the load of each batcher."""

        async def load(batcher: Child) -> routing.TierLoad:
            async with connect(batcher.address) as client:
                return (await client.list_tiers(timeout=30)).tiers[0].load

        return list(await asyncio.gather(*(load(batcher) for batcher in self.batchers)))

    async def busiest_batcher(self) -> Child:
        """Return the batcher with the most requests."""
        loads = await self.loads()
        return max(zip(self.batchers, loads, strict=True), key=lambda pair: pair[1].queued + pair[1].running)[
            0
        ]

    async def busiest_router(self) -> Child:
        """Return the router with the most requests: a client does not know which one its channel uses."""
        states = await asyncio.gather(*(router.inspect() for router in self.routers))
        return max(zip(self.routers, states, strict=True), key=lambda pair: pair[1].process_state.requests)[0]

    async def quiet(self, *, seconds: float = 90.0) -> None:
        """Wait until no batcher has a queued or running request."""
        async with asyncio.timeout(seconds):
            while any(load.queued or load.running for load in await self.loads()):
                await asyncio.sleep(0.05)

    async def heal(self) -> None:
        """Have all processes running, ready and known to their clients."""
        await asyncio.gather(*(child.heal() for child in self.children))
        await self.known()

    async def known(self) -> None:
        """Wait until every batcher has all workers, and every router has all batchers."""
        async with asyncio.timeout(START_SECONDS):
            while any(load.workers < len(self.workers) for load in await self.loads()):
                await asyncio.sleep(0.05)
            for router in self.routers:
                while sum(seen.ready for seen in (await router.inspect()).router.batchers) < len(
                    self.batchers
                ):
                    await asyncio.sleep(0.05)


# On a busy machine the messages of a burst of calls arrive long after their headers. Each such call reserves
# the size of the longest message, and the default limit would reject some with SERVER_BUSY.
_IN_FLIGHT = ("--max-inflight-megabytes", "1024")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The processes to start.

    flags      of each service, besides those that connect them
    start_seconds   time limit until all are ready
    to_worker, to_batcher   addresses that replace those of the n-th worker or batcher, such as a proxy's
    """

    workers: int = 2
    batchers: int = 2
    routers: int = 2
    tier: str = "only"
    worker_module: str = "tests.faults.dice_worker"
    worker_flags: Sequence[str] = ("--engine", "echo", "--fake-step-seconds", "0.01", "--max-running", "16")
    batcher_flags: Sequence[str] = ("--fake",)
    router_flags: Sequence[str] = ()
    to_worker: dict[int, str] = field(default_factory=dict)
    to_batcher: dict[int, str] = field(default_factory=dict)
    worker_ports: Sequence[int] = ()
    batcher_ports: Sequence[int] = ()
    start_seconds: float = START_SECONDS


@asynccontextmanager
async def fleet(plan: Plan, logs: Path) -> AsyncGenerator[Fleet, None]:
    """Run the processes of *plan* while the block runs; it is entered when all are ready."""
    # Reserved to the end: the port of a killed process seems free.
    with reserved_ports(plan.workers + plan.batchers + plan.routers) as ports:
        async with _fleet(plan, logs, iter(ports)) as running:
            yield running


@asynccontextmanager
async def _fleet(plan: Plan, logs: Path, ports: Iterator[int]) -> AsyncGenerator[Fleet, None]:
    worker_ports = list(plan.worker_ports) or [next(ports) for _ in range(plan.workers)]
    batcher_ports = list(plan.batcher_ports) or [next(ports) for _ in range(plan.batchers)]
    workers = [plan.to_worker.get(n, f"{HOST}:{port}") for n, port in enumerate(worker_ports)]
    batchers = [plan.to_batcher.get(n, f"{HOST}:{port}") for n, port in enumerate(batcher_ports)]
    running = Fleet()
    for n, port in enumerate(worker_ports):
        running.workers.append(
            Child(f"worker{n}", plan.worker_module, plan.worker_flags, port, logs / f"worker{n}.log")
        )
    for n, port in enumerate(batcher_ports):
        flags = ["--tier", plan.tier, "--workers", ",".join(workers), *_IN_FLIGHT, *plan.batcher_flags]
        running.batchers.append(
            Child(f"batcher{n}", "headrace.batcher", flags, port, logs / f"batcher{n}.log")
        )
    for n in range(plan.routers):
        flags = ["--tiers", f"{plan.tier}={'+'.join(batchers)}", *_IN_FLIGHT, *plan.router_flags]
        running.routers.append(
            Child(f"router{n}", "headrace.router", flags, next(ports), logs / f"router{n}.log")
        )
    try:
        await asyncio.gather(*(child.start() for child in running.children))
        await asyncio.gather(*(child.ready(seconds=plan.start_seconds) for child in running.children))
        await running.known()
        yield running
    finally:
        for child in running.children:
            if child.alive:
                child.send(signal.SIGCONT)
                child.send(signal.SIGKILL)
        await asyncio.gather(*(child.gone() for child in running.children if child.process))
