"""Each reason why a server cannot listen has its message; IPv6 works on every hop."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from headrace.batcher.__main__ import batcher
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.channel import open_channel
from headrace.client import connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings as RouterSettings
from headrace.runtime.serving.bind_check import bind_error, explain
from headrace.runtime.serving.server import CannotListen, PortInUse, Serving, serving
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, collect, eventually, prompt, running_worker, until_healthy

FOREIGN = "192.0.2.77"  # TEST-NET-1: not assigned


@asynccontextmanager
async def server(host: str, port: int = 0) -> AsyncGenerator[Serving, None]:
    async with serving(
        lambda server: None, (), host=host, port=port, drain_seconds=0, ready=lambda: True
    ) as running:
        yield running


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is in use on 127.0.0.1 and free on ::1."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "::"])
async def test_a_port_in_use_is_rejected_by_any_name_of_the_host(host: str, taken: int) -> None:
    """gRPC would listen on ::1 only, and callers of 127.0.0.1 would reach the other process."""
    if host == "::" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with pytest.raises(PortInUse, match="in use by another process"):
        async with server(host, taken):
            pass


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "::", "0.0.0.0", "localhost"])
async def test_a_port_in_use_on_ipv6_is_rejected(host: str) -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::1", 0))
        other.listen()
        with pytest.raises(PortInUse):
            async with server(host, other.getsockname()[1]):
                pass


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "0.0.0.0"])
async def test_all_addresses_include_both_families(host: str) -> None:
    async with server(host) as running:
        for target in (f"127.0.0.1:{running.port}", f"[::1]:{running.port}"):
            async with open_channel(target) as channel, asyncio.timeout(PATIENCE):
                await channel.channel_ready()


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        (FOREIGN, "does not have this address"),
        ("no-such-name.invalid", "does not resolve"),
        ("a..b", "does not resolve"),
        ("*", "gRPC cannot bind it"),
        ("unix:/tmp/socket", "does not resolve"),
    ],
)
async def test_an_address_that_cannot_be_used_is_distinguished_from_a_port_in_use(
    host: str, problem: str
) -> None:
    with pytest.raises(CannotListen, match=problem) as caught:
        async with server(host):
            pass
    assert not isinstance(caught.value, PortInUse)
    assert "another process" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "host", "port", "words"),
    [
        (errno.EACCES, "0.0.0.0", 443, "ports below 1024 need root"),
        (errno.EPERM, "0.0.0.0", 443, "ports below 1024 need root"),
        (errno.EACCES, "0.0.0.0", 50051, "Permission denied"),
        (errno.EAFNOSUPPORT, "::", 50051, r"on \[::\]:50051: this machine has no IPv6"),
        (errno.EADDRNOTAVAIL, "::1", 50051, "does not have this address"),
        (errno.EINVAL, "fe80::1", 50051, "needs its interface"),
        (errno.ENOBUFS, "::1", 50051, "No buffer space"),
    ],
)
def test_each_cause_has_its_own_message(number: int, host: str, port: int, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        raise RuntimeError(explain(OSError(number, os.strerror(number)), host, port))


def test_a_free_port_has_no_bind_error() -> None:
    assert bind_error("127.0.0.1", 0) is None
    assert bind_error("localhost", 0) is None


@needs_ipv6
async def test_a_mesh_uses_ipv6_on_every_hop() -> None:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(running_worker(EchoEngine(), host="::1"))
        middle = await stack.enter_async_context(
            batcher(
                BatcherSettings(
                    host="[::1]",
                    port=0,
                    tier="only",
                    workers=f"dns:///[::1]:{worker.server.port}",
                    fake=True,
                    drain_seconds=2.0,
                ),
                ByteTokenizer(),
                "b",
            )
        )
        await eventually(lambda: middle.server.health.ready)
        tiers = f"only=[::1]:{middle.server.port}"
        gate = await stack.enter_async_context(
            router(RouterSettings(host="::", port=0, tiers=tiers, drain_seconds=2, auth_anonymous="allow"))
        )
        for target in (f"[::1]:{gate.port}", f"ipv6:[::1]:{gate.port}", f"127.0.0.1:{gate.port}"):
            client = await stack.enter_async_context(connect(target))
            await until_healthy(client)
            assert (await collect(client, prompt("hello"))).text == "hello"
