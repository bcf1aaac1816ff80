"""A channel that follows the rotation of certificates closes what it no longer uses, and nothing earlier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from headrace.tls.channel import RotatingChannel
from headrace.tls.files import TlsFiles, TlsReader
from tests.certificates import Certificates, issued, replace
from tests.harness import eventually


class Echo:
    """A server that echoes each message of a stream, and counts its connections."""

    def __init__(self) -> None:
        self.peers: set[str] = set()

    async def stream(self, requests: Any, context: Any) -> AsyncGenerator[bytes, None]:
        self.peers.add(context.peer())
        async for request in requests:
            yield request

    async def once(self, request: bytes, context: Any) -> bytes:
        self.peers.add(context.peer())
        return request


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return issued(tmp_path, ["router", "admin"])


@asynccontextmanager
async def echo(certificates: Certificates) -> AsyncGenerator[tuple[Echo, RotatingChannel, list[Any]], None]:
    """Yield the server, a channel to it, and the channels that it has opened."""
    service, server, opened = Echo(), grpc.aio.server(), []
    handlers: dict[str, Any] = {
        "Stream": grpc.stream_stream_rpc_method_handler(service.stream),
        "Once": grpc.unary_unary_rpc_method_handler(service.once),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))
    files = certificates.client("router")
    credentials = grpc.ssl_server_credentials(
        [(files["key"].read_bytes(), files["cert"].read_bytes())], files["ca"].read_bytes(), True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()

    def open_channel(now: grpc.ChannelCredentials) -> grpc.aio.Channel:
        opened.append(grpc.aio.secure_channel(f"127.0.0.1:{port}", now))
        return opened[-1]

    reader = TlsReader(TlsFiles(**certificates.client()), check_seconds=0.0)
    try:
        async with RotatingChannel(reader, open_channel) as channel:
            yield service, channel, opened
    finally:
        await server.stop(None)


def rotate(certificates: Certificates) -> None:
    """Replace the client's certificate by a new one of the same authority."""
    issued(certificates.folder, ["admin"])


def is_closed(channel: Any) -> bool:
    return bool(channel._channel.closed())


async def test_calls_share_one_connection_while_the_files_are_the_same(certificates: Certificates) -> None:
    async with echo(certificates) as (service, channel, opened):
        once: Any = channel.unary_unary("/t/Once")
        assert [await once(b"%d" % number) for number in range(20)] == [b"%d" % n for n in range(20)]

        assert len(opened) == len(service.peers) == 1


async def test_a_stream_continues_on_its_connection_and_new_calls_use_the_new_files(
    certificates: Certificates,
) -> None:
    async with echo(certificates) as (service, channel, opened):
        once: Any = channel.unary_unary("/t/Once")
        stream = channel.stream_stream("/t/Stream")()
        await stream.write(b"before")
        assert await stream.read() == b"before"
        rotate(certificates)
        assert await once(b"new") == b"new"
        await stream.write(b"after")
        assert await stream.read() == b"after"
        assert len(opened) == len(service.peers) == 2
        assert not is_closed(opened[0])

        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        await eventually(lambda: is_closed(opened[0]))
        assert await once(b"still") == b"still"


async def test_an_idle_connection_is_closed_when_the_files_change(certificates: Certificates) -> None:
    async with echo(certificates) as (_, channel, opened):
        once: Any = channel.unary_unary("/t/Once")
        await once(b"1")
        rotate(certificates)
        await once(b"2")

        await eventually(lambda: is_closed(opened[0]))
        assert not is_closed(opened[1])


async def test_a_cancelled_call_releases_its_connection(certificates: Certificates) -> None:
    async with echo(certificates) as (_, channel, opened):
        stream = channel.stream_stream("/t/Stream")()
        await stream.write(b"1")
        await stream.read()
        rotate(certificates)
        await channel.unary_unary("/t/Once")(b"2")
        assert not is_closed(opened[0])

        stream.cancel()

        await eventually(lambda: is_closed(opened[0]))


async def test_closing_the_channel_ends_calls_on_all_its_connections(certificates: Certificates) -> None:
    async with echo(certificates) as (_, channel, opened):
        streams = []
        for _number in range(3):
            stream = channel.stream_stream("/t/Stream")()
            await stream.write(b"1")
            await stream.read()
            streams.append(stream)
            rotate(certificates)
        await channel.close()

        assert len(opened) == 3
        assert all(map(is_closed, opened))
        assert [await stream.code() for stream in streams] == [grpc.StatusCode.CANCELLED] * 3


async def test_waiting_for_a_connection_ends_when_files_that_the_server_trusts_arrive(
    certificates: Certificates, tmp_path: Path
) -> None:
    """A client that starts with an authority that has been replaced connects without a restart."""
    right = certificates.ca.read_bytes()
    async with echo(certificates) as (_, channel, _opened):
        replace(certificates.ca, issued(tmp_path / "other").ca.read_bytes())
        waiting = asyncio.create_task(channel.channel_ready())
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/t/Once")(b"1")
        assert not waiting.done()

        replace(certificates.ca, right)

        async with asyncio.timeout(10):
            await waiting
        assert await channel.unary_unary("/t/Once")(b"1") == b"1"


async def test_those_who_wait_for_a_connection_go_on_when_the_files_change(
    certificates: Certificates, tmp_path: Path
) -> None:
    right = certificates.ca.read_bytes()
    async with echo(certificates) as (_, channel, opened):
        replace(certificates.ca, issued(tmp_path / "other").ca.read_bytes())
        waiting = [asyncio.create_task(channel.channel_ready()) for _ in range(3)]
        await eventually(lambda: len(opened) > 1)
        for number in range(2, 5):  # one of them opens a channel, which closes the one of the others
            replace(certificates.ca, issued(tmp_path / f"other {number}").ca.read_bytes())
            await eventually(lambda number=number: len(opened) > number)  # type: ignore[misc]
        assert not any(task.done() for task in waiting)

        replace(certificates.ca, right)
        async with asyncio.timeout(10):
            await asyncio.gather(*waiting)
