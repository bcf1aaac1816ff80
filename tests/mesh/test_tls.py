"""A mesh whose connections all use TLS: who may call what, and how certificates are replaced."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from headrace import errors
from headrace.channel import open_channel
from headrace.client import connect
from headrace.runtime.process_info import SERVICES as ADMIN
from headrace.tls.files import TlsFiles, TlsReader
from headrace.v1 import generation_service_pb2, routing_service_pb2, worker_service_pb2
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import Result, Row
from tests.certificates import Certificates, issued, replace
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt, running_mesh

REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
CHANNELZ = "/grpc.channelz.v1.Channelz/GetServers"
HEALTH = "/grpc.health.v1.Health/Check"
INSPECT = "/headrace.v1.AdminService/Inspect"
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
TEXT = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return issued(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
async def mesh(certificates: Certificates) -> AsyncGenerator[Mesh, None]:
    async with running_mesh("small", **certificates.mesh()) as running:
        yield running


def port_of(mesh: Mesh, service: str) -> int:
    parts = mesh.tiers["small"]
    return {"router": mesh.port, "batcher": parts.batcher.server.port, "worker": parts.worker.server.port}[
        service
    ]


async def status_of(port: int, method: str, certificates: Certificates, name: str | None) -> grpc.StatusCode:
    """Call *method* with an empty message, and return the status."""
    files = TlsFiles(**certificates.client(name)) if name else TlsFiles(ca=certificates.ca)
    async with open_channel(f"127.0.0.1:{port}", tls=TlsReader(files)) as channel:
        # One request whatever the method takes: a stream of requests that is refused while it is sent ends as
        # INTERNAL in grpc.aio, whatever the server's status is.
        start: Any = channel.unary_stream(method)
        call = start(b"", timeout=PATIENCE)
        with suppress(grpc.aio.AioRpcError):
            async for _ in call:  # the status follows the last message
                pass
        code: grpc.StatusCode = await call.code()
        return code


def methods(service: str) -> Iterator[str]:
    """Yield every method that a service offers."""
    own = {
        "router": (generation_service_pb2, routing_service_pb2),
        "batcher": (generation_service_pb2, routing_service_pb2),
        "worker": (worker_service_pb2,),
    }[service]
    descriptors = [one for module in own for one in module.DESCRIPTOR.services_by_name.values()]
    for descriptor in (*descriptors, *ADMIN):
        for method in descriptor.methods:
            yield f"/{descriptor.full_name}/{method.name}"
    yield from (REFLECTION, CHANNELZ, HEALTH)


ALLOWED = {
    "router": {"caller", "router", "admin"},
    "batcher": {"router", "admin"},
    "worker": {"batcher", "admin"},
}


@pytest.mark.parametrize("service", ["router", "batcher", "worker"])
async def test_a_certificate_may_call_what_its_role_needs_and_nothing_else(
    mesh: Mesh, certificates: Certificates, service: str
) -> None:
    names = ("caller", "router", "batcher", "worker", "admin")
    expected, seen = {}, {}
    for method in methods(service):
        allowed = ALLOWED[service]
        if method in (REFLECTION, CHANNELZ, INSPECT):
            allowed = {"admin"}
        elif method == HEALTH:
            allowed = set(names)
        elif method.endswith("/Feedback") and service == "router":
            allowed = {"caller", "admin"}
        for name in names:
            expected[method, name] = name in allowed
            status = await status_of(port_of(mesh, service), method, certificates, name)
            assert status is not grpc.StatusCode.UNAVAILABLE, (method, name)
            seen[method, name] = status not in REFUSED

    assert {method for method, _ in seen} >= {INSPECT, REFLECTION, CHANNELZ, HEALTH}
    assert seen == expected


@pytest.mark.parametrize("service", ["router", "batcher", "worker"])
async def test_a_client_without_certificate_is_not_connected(
    mesh: Mesh, certificates: Certificates, service: str
) -> None:
    assert await status_of(port_of(mesh, service), HEALTH, certificates, None) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("service", ["router", "batcher", "worker"])
async def test_a_certificate_of_another_authority_is_not_connected(
    mesh: Mesh, certificates: Certificates, service: str, tmp_path: Path
) -> None:
    """Even if it names the same role."""
    other = issued(tmp_path)
    other.ca.write_bytes(certificates.ca.read_bytes())  # so that the client trusts the server

    status = await status_of(port_of(mesh, service), HEALTH, other, "admin")

    assert status is grpc.StatusCode.UNAVAILABLE


async def test_a_mesh_over_tls_answers_as_any_other(mesh: Mesh) -> None:
    answer = await collect(mesh.client, prompt(TEXT, max_tokens=100))

    assert answer.text == TEXT
    await eventually(lambda: not mesh.left_behind)


async def test_a_plaintext_client_reads_that_the_server_may_require_tls(mesh: Mesh) -> None:
    async with connect(f"127.0.0.1:{mesh.port}", retries=0) as client:
        with pytest.raises(errors.Unavailable, match="it may require TLS"):
            await client.list_tiers()


async def test_a_tls_client_reads_that_the_server_speaks_none(certificates: Certificates) -> None:
    async with (
        running_mesh("small") as plain,
        connect(f"127.0.0.1:{plain.port}", retries=0, **certificates.client()) as client,
    ):
        with pytest.raises(errors.Unavailable, match="does not speak TLS"):
            await client.list_tiers()


async def test_a_client_reads_that_the_certificate_has_another_name(
    mesh: Mesh, certificates: Certificates
) -> None:
    options = {"server_name": "router.example", **certificates.client()}
    async with connect(f"127.0.0.1:{mesh.port}", retries=0, **options) as client:
        with pytest.raises(errors.Unavailable, match="not for the name"):
            await client.list_tiers()


async def test_a_client_reads_that_the_authority_is_unknown(mesh: Mesh, tmp_path: Path) -> None:
    async with connect(f"127.0.0.1:{mesh.port}", retries=0, ca=issued(tmp_path).ca) as client:
        with pytest.raises(errors.Unavailable, match="not signed by"):
            await client.list_tiers()


async def test_workers_behind_a_name_are_verified_by_that_name(tmp_path: Path) -> None:
    """Each address of a name has a connection of its own, and certificates contain names, not addresses."""
    certificates = issued(tmp_path, hosts=["localhost"])
    async with running_mesh(
        "small",
        worker_settings=certificates.settings("worker"),
        batcher_settings=certificates.settings("batcher"),
        router_settings=certificates.settings("router"),
        client_options={"server_name": "localhost", **certificates.client()},
        host="dns:///localhost",
    ) as mesh:
        assert (await collect(mesh.client, prompt(TEXT, max_tokens=100))).text == TEXT


class Paced(EchoEngine):
    """Computes slowly until it need not."""

    slow = True

    def step(self, rows: Sequence[Row]) -> list[Result]:
        if self.slow:
            time.sleep(0.02)
        return super().step(rows)


async def test_several_addresses_are_verified_by_the_first_ones_host(
    mesh: Mesh, certificates: Certificates
) -> None:
    target = f"ipv4:127.0.0.1:{mesh.port},127.0.0.1:{mesh.port}"
    async with connect(target, retries=0, **certificates.client()) as client:
        assert [tier.name for tier in (await client.list_tiers()).tiers] == ["small"]


async def test_certificates_and_authority_are_replaced_under_a_running_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stream is dropped in the three steps: both authorities, new certificates, the new authority."""
    monkeypatch.setattr("headrace.tls.files.CHECK_SECONDS", 0.02)
    live, new, old = issued(tmp_path / "live"), issued(tmp_path / "new"), Certificates(tmp_path / "old")
    shutil.copytree(live.folder, old.folder)
    engine, go = Paced(), asyncio.Event()

    async with running_mesh("small", engine=lambda: engine, **live.mesh()) as mesh:

        async def ask() -> tuple[str, int]:
            text, deltas = "", 0
            stream = mesh.client.generate(prompt(TEXT * 20, max_tokens=1024), timeout=PATIENCE)
            async with aclosing(stream) as responses:
                async for response in responses:
                    text += response.delta.text
                    deltas += 1
                    go.set()
            return text, deltas

        running = asyncio.create_task(ask())
        await go.wait()
        replace(live.ca, live.ca.read_bytes() + new.ca.read_bytes())
        await answers(mesh, live)
        for name in ("router", "batcher", "worker", "admin"):
            for end in ("key", "pem"):
                replace(live.folder / f"{name}.{end}", (new.folder / f"{name}.{end}").read_bytes())
        await answers(mesh, live)
        replace(live.ca, new.ca.read_bytes())
        await answers(mesh, live)
        assert not running.done(), "the stream must outlast the replacement"
        engine.slow = False
        text, _ = await running

        assert text == TEXT * 20
        await answers(mesh, new)
        for service in ("router", "batcher", "worker"):
            port = port_of(mesh, service)
            await eventually_refused(port, old)


async def answers(mesh: Mesh, certificates: Certificates) -> None:
    """Connect to each service with the current certificates."""
    for service in ("router", "batcher", "worker"):
        async with asyncio.timeout(PATIENCE):
            while True:
                status = await status_of(port_of(mesh, service), HEALTH, certificates, "admin")
                if status is not grpc.StatusCode.UNAVAILABLE:
                    break
                await asyncio.sleep(0.02)


async def eventually_refused(port: int, certificates: Certificates) -> None:
    """Wait until certificates of the old authority are refused."""
    async with asyncio.timeout(PATIENCE):
        while await status_of(port, HEALTH, certificates, "admin") is not grpc.StatusCode.UNAVAILABLE:
            await asyncio.sleep(0.02)
