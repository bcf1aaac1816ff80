"""The syntax of targets, and which channels go through a proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.channel import is_local, join, open_channel, proxy_variable, reconnected, split, target_problem
from headrace.cli.complaints import advice
from headrace.client import Client, connect
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, collect, prompt, running_mesh

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
NOWHERE = "192.0.2.77:50051"  # TEST-NET-1: an address that no host has


@given(
    host=st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True)),
    port=st.integers(1, 65535),
)
def test_an_address_is_parsed(host: str, port: int) -> None:
    assert split(join(host, port)) == (host, str(port))
    assert split(join(f"[{host}]", port)) == (host, str(port))
    assert target_problem(join(host, port)) == ""


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("::1:50051", "IPv6 address without brackets"),
        ("fe80::1", "IPv6 address without brackets"),
        ("dns:///::1:50051", "IPv6 address without brackets"),
        ("http://127.0.0.1:50051", "not a gRPC target"),
        ("grpc://mesh:50051", "not a gRPC target"),
        ("", "not a gRPC target"),
        ("localhost", "no port"),
        ("[::1]", "no port"),
        ("dns:///router", "no port"),
        ("localhost:0", "no port from 1"),
        ("localhost:70000", "no port from 1 to 65535"),
        ("localhost:http", "no port"),
        (":50051", "no host"),
    ],
)
def test_an_invalid_target_is_explained(target: str, problem: str) -> None:
    assert problem in target_problem(target)
    assert "[::1]:50051" in advice(errors.Unavailable("no connection"), target)


@pytest.mark.parametrize(
    "target",
    [
        "[::1]:50051",
        "dns:[::1]:50051",
        "dns:///[fe80::1%eth0]:50051",
        "dns://8.8.8.8/router:50051",
        "ipv4:10.0.0.1:50051,10.0.0.2:50051",
        "ipv6:[::1]:50051,[::2]:50051",
        "unix:/tmp/socket",
        "unix-abstract:name",
        "xds:///router",
    ],
)
def test_every_target_syntax_of_grpc_is_accepted(target: str) -> None:
    assert target_problem(target) == ""


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("127.1:1", True),
        ("localhost:1", True),
        ("LOCALHOST:1", True),
        ("dns:///localhost:1", True),
        ("[::1]:1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("0.0.0.0:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/tmp/socket", True),
        ("10.0.0.1:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("localhost.example.com:1", False),
        ("router:50051", False),
        ("dns:///router:50051", False),
    ],
)
def test_loopback_targets_are_recognised(target: str, local: bool) -> None:
    assert is_local(target) is local


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({}, ""),
        ({"http_proxy": "http://user:secret@proxy:3128"}, "http_proxy"),
        ({"http_proxy": "http://a:1", "https_proxy": "http://b:1"}, "https_proxy"),
        ({"grpc_proxy": "http://a:1", "https_proxy": "http://b:1"}, "grpc_proxy"),
        ({"grpc_proxy": "", "http_proxy": "http://a:1"}, "http_proxy"),
        ({"https_proxy": "socks5://a:1"}, ""),  # the only scheme that gRPC accepts
        ({"HTTPS_PROXY": "http://a:1"}, ""),  # gRPC ignores the upper-case variable
        ({"http_proxy": "http://a:1", "no_proxy": "example.com, 192.0.2.0/24"}, ""),
        ({"http_proxy": "http://a:1", "no_proxy": "192.0.2.77"}, ""),
        ({"http_proxy": "http://a:1", "no_proxy": "10.0.0.0/8"}, "http_proxy"),
        ({"http_proxy": "http://a:1", "no_grpc_proxy": "x", "no_proxy": "192.0.2.77"}, "http_proxy"),
    ],
)
def test_the_proxy_of_a_target_is_the_one_that_grpc_uses(environment: dict[str, str], variable: str) -> None:
    assert proxy_variable(NOWHERE, environment) == variable
    assert proxy_variable("127.0.0.1:50051", environment) == ""


@dataclass
class Proxy:
    """An HTTP proxy that rejects every request and records it."""

    address: str = ""
    asked: list[str] = field(default_factory=list)


@asynccontextmanager
async def refusing_proxy() -> AsyncGenerator[Proxy, None]:
    proxy = Proxy()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        proxy.asked.append(line.decode().strip())
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    proxy.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield proxy


async def test_calls_between_our_own_processes_use_no_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole mesh starts, answers and reports its health, whatever proxy the variables name."""
    async with refusing_proxy() as proxy:
        for variable in PROXIES:
            monkeypatch.setenv(variable, proxy.address)
        async with running_mesh("only", engine=EchoEngine) as mesh:
            assert (await collect(mesh.client, prompt("hello"))).text == "hello"

        assert proxy.asked == []


async def test_inner_hops_never_use_a_proxy_and_others_do_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with refusing_proxy() as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)

        async with Client(open_channel(NOWHERE, direct=True), retries=0) as client:
            with pytest.raises((errors.Unavailable, errors.DeadlineExceeded)):
                await client.list_tiers(timeout=0.2)
        assert proxy.asked == []

        async with connect(NOWHERE, retries=0) as client:
            with pytest.raises(errors.Unavailable, match="the proxy that http_proxy sets") as caught:
                await client.list_tiers(timeout=20)
        assert set(proxy.asked) == {f"CONNECT {NOWHERE} HTTP/1.1"}
        assert "http_proxy" in advice(caught.value, NOWHERE)


async def test_a_target_in_the_wrong_form_is_named_in_the_error() -> None:
    async with connect("::1:50051", retries=0) as client:
        with pytest.raises(errors.Unavailable, match="IPv6 address without brackets"):
            await client.list_tiers(timeout=20)


class States:
    """The state of a channel, set by the test."""

    def __init__(self, state: grpc.ChannelConnectivity) -> None:
        self._state = state
        self._changed = asyncio.Event()

    def become(self, state: grpc.ChannelConnectivity) -> None:
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._state

    async def wait_for_state_change(self, last: grpc.ChannelConnectivity) -> None:
        while self._state is last:
            await self._changed.wait()

    async def channel_ready(self) -> None:
        while self._state is not grpc.ChannelConnectivity.READY:
            await self._changed.wait()


async def test_a_connection_that_broke_is_not_taken_for_a_new_one() -> None:
    states = States(grpc.ChannelConnectivity.READY)
    waiting = asyncio.create_task(reconnected(cast(grpc.aio.Channel, states)))
    await asyncio.sleep(0)
    for state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
        states.become(state)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done(), "gRPC has not noticed yet"

    states.become(grpc.ChannelConnectivity.READY)
    await waiting


async def test_a_connection_that_was_opened_meanwhile_is_used() -> None:
    states = States(grpc.ChannelConnectivity.READY)
    async with asyncio.timeout(PATIENCE):
        await reconnected(cast(grpc.aio.Channel, states))
