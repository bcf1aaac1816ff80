"""Every port has health, reflection and channelz, and a server drains without losing requests."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace import errors
from headrace.batcher.__main__ import batcher
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.channel import CHANNEL_OPTIONS, open_channel
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import connect
from headrace.runtime.serving import server
from headrace.worker.__main__ import Worker
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.runner import Runner
from headrace.worker.sequences import SequenceKey
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt, running_mesh, running_worker

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def reserved() -> Iterator[Callable[[int], list[int]]]:
    """Reserves ports until the end of the test."""
    with ExitStack() as held:
        yield lambda count: held.enter_context(reserved_ports(count))


async def health(port: int, service: str) -> int:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE)
        return int(reply.status)


def ports(mesh: Mesh) -> list[int]:
    tiers = mesh.tiers.values()
    return [
        mesh.port,
        *(parts.batcher.server.port for parts in tiers),
        *(parts.worker.server.port for parts in tiers),
    ]


async def test_an_idle_client_keeps_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It pings as often as gRPC allows, and the server accepts that."""
    quick = [(name, 10 if "ping_interval" in name else value) for name, value in server._OPTIONS]
    monkeypatch.setattr(server, "_OPTIONS", [*quick, ("grpc.http2.max_ping_strikes", 1)])
    often = [(name, 100 if name == "grpc.keepalive_time_ms" else value) for name, value in CHANNEL_OPTIONS]
    async with (
        running_worker(EchoEngine()) as parts,
        grpc.aio.insecure_channel(f"127.0.0.1:{parts.server.port}", options=often) as channel,
    ):
        await channel.channel_ready()

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4):  # one ping a second; the third that is not allowed ends it
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)


async def test_every_server_reports_readiness_and_liveness(mesh: Mesh) -> None:
    for port in ports(mesh):
        for service in ("", "readiness", "liveness"):
            async with asyncio.timeout(PATIENCE):  # on a busy machine, the router's poll may be late
                while await health(port, service) != SERVING:
                    await asyncio.sleep(0.05)


async def test_those_who_watch_the_health_take_no_calls_from_others() -> None:
    async with running_mesh("small", router_settings={"max_calls": 16}) as mesh, AsyncExitStack() as stack:
        firsts = []
        for _ in range(20):
            channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{mesh.port}"))
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            try:
                firsts.append(await watch.read())
            except grpc.aio.AioRpcError as error:
                firsts.append(error.code())
        answer = await collect(mesh.client, prompt("x"))

    # Half of a quarter of 16 calls: what one connection may hold, which the channels share.
    assert sum(isinstance(first, health_pb2.HealthCheckResponse) for first in firsts) == 2
    assert firsts.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 18
    assert answer.text == "x"


NAMES = {
    "router": ["headrace.v1.GenerationService", "headrace.v1.RoutingService", "headrace.v1.AdminService"],
    "batcher": ["headrace.v1.GenerationService", "headrace.v1.RoutingService", "headrace.v1.AdminService"],
    "worker": ["headrace.v1.WorkerService", "headrace.v1.AdminService"],
}


async def test_the_health_of_a_service_by_its_full_name_is_readiness(mesh: Mesh) -> None:
    """As client-side health checking and Envoy request it."""
    small = mesh.tiers["small"]
    for kind, port in (
        ("router", mesh.port),
        ("batcher", small.batcher.server.port),
        ("worker", small.worker.server.port),
    ):
        for name in NAMES[kind]:
            assert await health(port, name) == SERVING
        for name in ("headrace.v1.Unknown", "GenerationService", "headrace.v1.GenerationService/Generate"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health(port, name)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watching_a_service_by_name_reports_its_readiness(mesh: Mesh) -> None:
    small = mesh.tiers["small"]
    async with open_channel(f"127.0.0.1:{small.batcher.server.port}") as channel, asyncio.timeout(PATIENCE):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="headrace.v1.GenerationService"))
        assert (await watch.read()).status == SERVING
        next(iter(small.batcher.coalescer.pool)).draining = True
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_a_worker_is_alive_but_not_ready_until_its_model_is_warm(
    reserved: Callable[[int], list[int]],
) -> None:
    import threading

    from headrace.worker.__main__ import engine_loop, worker
    from headrace.worker.settings import Settings

    loaded = threading.Event()

    (port,) = reserved(1)
    settings = Settings(port=port, engine="echo")

    def load() -> Runner[SequenceKey]:
        assert loaded.wait(PATIENCE)
        return engine_loop(EchoEngine(), settings)

    async def serve() -> None:
        async with worker(settings, load, "w"):
            await asyncio.Event().wait()

    serving = asyncio.create_task(serve())

    async def answers() -> bool:
        try:
            return await health(port, "liveness") == SERVING
        except grpc.aio.AioRpcError:
            return False

    while not await answers():
        await asyncio.sleep(0.02)
    assert await health(port, "readiness") == NOT_SERVING
    loaded.set()
    while await health(port, "readiness") != SERVING:
        await asyncio.sleep(0.02)
    serving.cancel()
    await asyncio.wait([serving])


async def test_a_batcher_without_workers_is_alive_but_not_ready(mesh: Mesh) -> None:
    small = mesh.tiers["small"]
    next(iter(small.batcher.coalescer.pool)).draining = True
    await eventually(lambda: not small.batcher.server.health.ready)

    assert await health(small.batcher.server.port, "readiness") == NOT_SERVING
    assert await health(small.batcher.server.port, "liveness") == SERVING


async def test_channelz_lists_the_servers(mesh: Mesh) -> None:
    async with open_channel(f"127.0.0.1:{mesh.port}") as channel:
        stub: Any = channelz_pb2_grpc.ChannelzStub(channel)  # type: ignore[arg-type]
        servers = await stub.GetServers(channelz_pb2.GetServersRequest())

    assert len(servers.server) >= 5


async def test_draining_finishes_running_requests_and_rejects_new_ones() -> None:
    async with running_mesh("only", engine=lambda: EchoEngine(step_seconds=0.01)) as mesh:
        batcher = mesh.tiers["only"].batcher.server
        async with connect(f"127.0.0.1:{batcher.port}", retries=0) as client:
            running = asyncio.create_task(collect(client, prompt("x" * 50)))
            await eventually(lambda: mesh.tiers["only"].worker.streams.in_flight)
            batcher.requests.drain()

            with pytest.raises(errors.Draining) as caught:
                await collect(client, prompt("late"))
            assert caught.value.retry_after is not None
            assert (await running).text == "x" * 50


async def test_a_draining_worker_returns_what_it_cannot_finish() -> None:
    engine = EchoEngine(step_seconds=0.02)
    worker_up = running_worker(engine, drain_seconds=0.2)
    worker = await worker_up.__aenter__()
    settings = BatcherSettings(
        port=0, tier="t", workers=f"127.0.0.1:{worker.server.port}", fake=True, failover_seconds=0
    )
    async with batcher(settings, ByteTokenizer(), "b") as running:
        await eventually(running.coalescer.pool.ready)
        async with connect(f"127.0.0.1:{running.server.port}", retries=0) as client:
            endless = asyncio.create_task(collect(client, prompt("x", max_tokens=1000, ignore_eos=True)))
            await eventually(lambda: worker.streams.in_flight)
            await worker_up.__aexit__(None, None, None)

            with pytest.raises(errors.WorkerLost, match="no worker was ready"):
                await endless
            load = worker.streams.load()
            assert load.kv_tokens_free == load.kv_tokens_total


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_sigterm_drains_and_exits_0(reserved: Callable[[int], list[int]]) -> None:
    worker_port, batcher_port = reserved(2)
    worker = await start(
        "headrace.worker", "--engine", "echo", "--port", str(worker_port), "--fake-step-seconds", "0.02"
    )
    batcher = await start(
        *("headrace.batcher", "--fake", "--tier", "t", "--port", str(batcher_port)),
        *("--workers", f"127.0.0.1:{worker_port}"),
    )
    async with connect(f"127.0.0.1:{batcher_port}", retries=0) as client:

        async def ready() -> bool:
            try:
                return (await client.list_tiers()).tiers[0].healthy
            except errors.HeadraceError:
                return False

        async with asyncio.timeout(PATIENCE):
            while not await ready():
                await asyncio.sleep(0.05)
        async with aclosing(client.generate(prompt("x" * 40), timeout=PATIENCE)) as stream:
            await anext(stream)
            batcher.send_signal(signal.SIGTERM)
            events = [response.WhichOneof("event") async for response in stream]
        assert events[-1] == "finish", "what was under way is finished"
    worker.send_signal(signal.SIGTERM)

    for process in (batcher, worker):
        _, logs = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == 0, logs.decode()
        lines = logs.decode().splitlines()
        assert all(line.startswith("{") for line in lines), "logs are JSON lines"


async def test_missing_and_invalid_settings_are_all_listed() -> None:
    process = await start("headrace.batcher", "--fake", "--port", "abc", "--queue-limit", "0")
    _, complaint = await asyncio.wait_for(process.communicate(), PATIENCE)

    assert process.returncode == 2
    text = complaint.decode()
    assert "HEADRACE_WORKERS is not set" in text
    assert "HEADRACE_PORT='abc'" in text
    assert "HEADRACE_QUEUE_LIMIT='0'" in text
    assert "Traceback" not in text


async def test_help_explains_every_flag() -> None:
    for service in ("router", "batcher", "worker"):
        process = await start(f"headrace.{service}", "--help")
        text, _ = await asyncio.wait_for(process.communicate(), PATIENCE)

        assert process.returncode == 0
        assert "--drain-seconds" in text.decode()
        assert "after SIGTERM" in " ".join(text.decode().split())


@asynccontextmanager
async def one_tier(**settings: Any) -> AsyncGenerator[tuple[Worker, Callable[[], Any]], None]:
    """A worker whose steps take 20 ms, and a function that starts batchers for it."""

    def make() -> Any:
        return batcher(
            BatcherSettings(port=0, workers=f"127.0.0.1:{running.server.port}", fake=True, **settings),
            ByteTokenizer(),
            "b",
        )

    async with running_worker(EchoEngine(step_seconds=0.02)) as running:
        yield running, make


async def test_requests_that_outlast_the_drain_end_as_draining() -> None:
    async with one_tier(drain_seconds=0.1) as (worker, make):
        up = make()
        running = await up.__aenter__()
        await eventually(running.coalescer.pool.ready)
        async with connect(f"127.0.0.1:{running.server.port}", retries=0) as client:
            request = prompt("x", max_tokens=2000, ignore_eos=True)
            async with aclosing(client.generate(request, timeout=PATIENCE, resume=False)) as stream:
                await anext(stream)
                stopping = asyncio.create_task(up.__aexit__(None, None, None))
                with pytest.raises(errors.Draining):
                    async for _ in stream:
                        pass
            await stopping
        await eventually(lambda: not worker.streams.in_flight)


async def test_a_client_of_two_servers_uses_the_other_when_one_drains() -> None:
    async with one_tier(drain_seconds=PATIENCE) as (_, make):
        ups = {up: await up.__aenter__() for up in (make(), make())}
        for running in ups.values():
            await eventually(running.coalescer.pool.ready)
        ports = ",".join(f"127.0.0.1:{running.server.port}" for running in ups.values())
        # With retries: a request that was sent before the GOAWAY arrived is rejected.
        async with connect(f"ipv4:{ports}") as client:
            under_way = asyncio.create_task(collect(client, prompt("x" * 50)))
            await eventually(lambda: any(running.server.requests.in_flight for running in ups.values()))
            going, staying = sorted(ups, key=lambda up: -ups[up].server.requests.in_flight)
            stopping = asyncio.create_task(going.__aexit__(None, None, None))
            await eventually(lambda: ups[going].server.requests.draining)

            assert (await collect(client, prompt("later"))).text == "later"
            assert (await under_way).text == "x" * 50
            await stopping
        await staying.__aexit__(None, None, None)
