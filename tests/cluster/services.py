"""Run the processes of a mesh on the hosts of a network, and publish their addresses in DNS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.channel import open_channel
from headrace.client import connect
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import generation_pb2 as pb
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from tests.cluster.network import NAME_SERVER, Host, Network

GATEWAY, ROUTER, BATCHER, WORKER = "gateway", "router", "batcher", "worker"
PORTS = {GATEWAY: 8080, ROUTER: 50051, BATCHER: 50052, WORKER: 50053}
PATIENCE = 90.0  # seconds; the limit of every wait, far beyond what a busy machine needs
DRAIN_SECONDS = 30.0


def name_of(role: str) -> str:
    """Return the DNS name of all servers of a role."""
    return f"{role}.headrace.test"


def target_of(role: str) -> str:
    """Return the gRPC target of all servers of a role."""
    return f"dns:///{name_of(role)}:{PORTS[role]}"


FLAGS: dict[str, Sequence[str]] = {
    GATEWAY: ("--router", target_of(ROUTER)),
    ROUTER: (
        *("--tiers", f"only={target_of(BATCHER)}", "--poll-seconds", "0.5", "--stall-seconds", "2"),
        *("--max-connection-age", "2"),
    ),
    BATCHER: ("--tier", "only", "--fake", "--workers", target_of(WORKER)),
    WORKER: ("--engine", "echo", "--fake-step-seconds", "0.02", "--max-running", "64"),
}


@dataclass
class Server:
    """One server on a host of its own, such as `router0`."""

    name: str
    host: Host
    log: Path
    process: asyncio.subprocess.Process

    @property
    def role(self) -> str:
        """What it is: gateway, router, batcher or worker."""
        return self.name.rstrip("0123456789")

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"{self.host.address}:{PORTS[self.role]}"

    async def ready(self) -> None:
        """Wait until it reports that it is ready."""
        async with asyncio.timeout(PATIENCE):
            while not await (self._ready_over_http() if self.role == GATEWAY else self._ready_over_grpc()):
                if self.process.returncode is not None:
                    raise AssertionError(f"{self.name} ended: {self.log.read_text()[-2000:]}")
                await asyncio.sleep(0.05)

    async def _ready_over_grpc(self) -> bool:
        async with open_channel(self.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            with suppress(grpc.aio.AioRpcError):
                reply = await stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=2)
                return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
        return False

    async def _ready_over_http(self) -> bool:
        async with httpx.AsyncClient(trust_env=False) as client:
            with suppress(httpx.TransportError):
                return (await client.get(f"http://{self.address}/health", timeout=2)).is_success
        return False

    async def inspect(self) -> admin.InspectResponse:
        """Return its state."""
        async with open_channel(self.address) as channel:
            return await AdminServiceStub(channel).Inspect(admin.InspectRequest(), timeout=PATIENCE)

    async def requests(self) -> int:
        """Return how many requests it holds; for a worker, sequences."""
        state = await self.inspect()
        return state.worker.in_flight if self.role == WORKER else state.process_state.requests

    async def gets_requests(self) -> float:
        """Wait until it holds requests. Returns the seconds that this took."""
        began = time.monotonic()
        async with asyncio.timeout(PATIENCE):
            while not await self.requests():
                await asyncio.sleep(0.05)
        return time.monotonic() - began


@dataclass
class Cluster:
    """The servers, and the names that lead to those that are published."""

    network: Network
    folder: Path
    servers: dict[str, Server] = field(default_factory=dict)
    published: set[str] = field(default_factory=set)

    async def launch(self, *names: str) -> None:
        """Start servers and publish them. Their callers find out when they are ready."""
        await asyncio.gather(*(self._run(name) for name in names))
        self.published |= set(names)
        self.publish()

    async def start(self, *names: str) -> None:
        """Start servers, wait until all are ready, and publish them."""
        await asyncio.gather(*(self._run(name) for name in names))
        # A batcher is ready when it has found a worker by its name, a router a batcher, a gateway a router.
        for role in (WORKER, BATCHER, ROUTER, GATEWAY):
            started = [self.servers[name] for name in names if name.startswith(role)]
            await asyncio.gather(*(server.ready() for server in started))
            self.published |= {server.name for server in started}
            self.publish()

    async def stop(self, name: str) -> int:
        """Withdraw a server's address and stop it with SIGTERM, as Kubernetes does. Returns its exit code."""
        server = self.servers.pop(name)
        self.published.discard(name)
        self.publish()
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            return await server.process.wait()

    async def kill_all(self) -> None:
        """Kill all servers."""
        for server in self.servers.values():
            if server.process.returncode is None:
                server.process.kill()
        await asyncio.gather(*(server.process.wait() for server in self.servers.values()))

    async def _run(self, name: str) -> None:
        host, role = self.network[name], name.rstrip("0123456789")
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *host.command(sys.executable, "-m", "headrace.cli.launch.child", str(os.getpid())),
                *(f"headrace.{role}", "--host", host.address, "--port", str(PORTS[role])),
                # Only the network is tested here, so there are no credentials.
                *("--drain-seconds", str(DRAIN_SECONDS), "--auth-anonymous", "allow", *FLAGS[role]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.servers[name] = Server(name, host, log, process)

    def publish(self) -> None:
        """Write the file of the name server."""
        zone: dict[str, list[str]] = {}
        for name in self.published:
            server = self.servers[name]
            zone.setdefault(name_of(server.role), []).append(server.host.address)
        new = self.folder / "zone.new"
        new.write_text(json.dumps(zone), encoding="ascii")
        new.replace(self.folder / "zone.json")


@asynccontextmanager
async def cluster(network: Network, folder: Path, *names: str) -> AsyncGenerator[Cluster, None]:
    """Run the name server and the servers of these names while the block runs."""
    running = Cluster(network, folder)
    running.publish()
    host = network[NAME_SERVER]
    served = await asyncio.create_subprocess_exec(
        *host.command(sys.executable, "-m", "headrace.cli.launch.child", str(os.getpid())),
        *("tests.cluster.names", host.address, str(folder / "zone.json")),
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        await running.start(*names)
        yield running
    finally:
        await running.kill_all()
        served.kill()
        await served.wait()


@dataclass
class Traffic:
    """Callers of the mesh, each of which makes one call after the other, and what became of the calls.

    answers    that were complete and right
    tokens     of them
    problems   of the others
    """

    answers: int = 0
    tokens: int = 0
    problems: list[str] = field(default_factory=list)
    stopping: bool = False

    async def call_on(self, ask: Ask, caller: int) -> None:
        """Make calls until the traffic stops. The echo engine repeats the prompt, so each answer is known."""
        number = 0
        while not self.stopping:
            text = f"caller {caller}, call {number}: " + "0123456789" * (2 + (caller + number) % 6)
            number += 1
            try:
                received = await ask(text)
                if received != text:
                    self.problems.append(f"{text!r} came as {received!r}")
                self.answers += 1
                self.tokens += len(received)
            except Exception as error:
                self.problems.append(f"{text!r}: {type(error).__name__}: {error}")

    async def continues(self, answers: int = 30) -> None:
        """Wait for so many further answers."""
        before = self.answers
        async with asyncio.timeout(PATIENCE):
            while self.answers < before + answers:
                await asyncio.sleep(0.02)


Ask: TypeAlias = Callable[[str], Awaitable[str]]  # sends a prompt and returns the answer


@asynccontextmanager
async def over_grpc() -> AsyncGenerator[Ask, None]:
    """Call the routers."""
    async with connect(target_of(ROUTER)) as client:

        async def ask(text: str) -> str:
            request = pb.GenerateRequest(prompt=text, sampling=pb.Sampling(max_tokens=500, temperature=0))
            async with aclosing(client.generate(request, timeout=PATIENCE)) as stream:
                return "".join([response.delta.text async for response in stream])

        yield ask


@asynccontextmanager
async def over_http(gateway: Server) -> AsyncGenerator[Ask, None]:
    """Call a gateway, whose answers are streamed."""
    url = f"http://{gateway.address}/v1/chat/completions"
    async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as client:

        async def ask(text: str) -> str:
            message = {"role": "user", "content": text}
            body = {"model": "auto", "messages": [message], "max_tokens": 500, "stream": True}
            received = ""
            async with client.stream("POST", url, json=body) as response:
                lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
            assert (response.status_code, lines[-1]) == (200, "[DONE]"), lines[-1]
            for line in lines[:-1]:
                for choice in json.loads(line)["choices"]:
                    received += choice["delta"].get("content") or ""
            return received

        yield ask


@asynccontextmanager
async def traffic(
    callers: int = 16, *, way: AbstractAsyncContextManager[Ask] | None = None
) -> AsyncGenerator[Traffic, None]:
    """Make calls while the block runs. Afterwards, fail if one was lost or its answer differs.

    way   how the mesh is called; by default `over_grpc`
    """
    counted = Traffic()
    async with way or over_grpc() as ask:
        tasks = [asyncio.create_task(counted.call_on(ask, caller)) for caller in range(callers)]
        try:
            await counted.continues(callers)
            yield counted
            await counted.continues(callers)
        finally:
            counted.stopping = True
            await asyncio.gather(*tasks)
    assert not counted.problems, f"{len(counted.problems)} of {counted.answers}: {counted.problems[:3]}"
