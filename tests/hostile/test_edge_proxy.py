"""Envoy with the configuration of k8s/edge-proxy bounds what gRPC does not, and callers get their answers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from headrace.channel import open_channel
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import chat
from tests.deploy import tools
from tests.harness import PATIENCE, Mesh, running_mesh
from tests.hostile.wire import (
    CONTINUATION,
    GENERATE,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    Peer,
    frame,
    headers,
    message,
    opened,
    peer,
)

CONFIG = Path(__file__).parent.parent.parent / "k8s" / "edge-proxy" / "envoy.yaml"
MOST_CONNECTIONS = 24


def replaced(value: Any, values: dict[str, Any]) -> Any:
    """Return the configuration *value* with other values for these keys, wherever they are."""
    if isinstance(value, dict):
        return {key: values[key] if key in values else replaced(each, values) for key, each in value.items()}
    return [replaced(each, values) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
async def edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[tuple[Mesh, int], None]:
    """Run a mesh behind Envoy, and return its port."""
    envoy = tools.need("envoy")
    folder = tmp_path_factory.mktemp("envoy")
    async with AsyncExitStack() as stack:
        (port,) = stack.enter_context(reserved_ports(1))
        mesh = await stack.enter_async_context(running_mesh("only"))
        shorter = {
            "request_headers_timeout": "1s",
            "idle_timeout": "2s",
            "max_active_downstream_connections": MOST_CONNECTIONS,
        }
        config = replaced(yaml.safe_load(CONFIG.read_text()), shorter)
        places = [config["static_resources"]["listeners"][0]["address"]["socket_address"]]
        (endpoints,) = config["static_resources"]["clusters"][0]["load_assignment"]["endpoints"]
        places.append(endpoints["lb_endpoints"][0]["endpoint"]["address"]["socket_address"])
        for place, number in zip(places, (port, mesh.port), strict=True):
            place.update(address="127.0.0.1", port_value=number)
        (path := folder / "envoy.yaml").write_text(yaml.safe_dump(config))
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(envoy, "--config-path", path, "--concurrency", "1", "--use-dynamic-base-id"),
                *("--log-level", "warning"),
                stdout=log,
                stderr=log,
            )
        try:
            async with asyncio.timeout(PATIENCE):
                while not await answers(port):
                    assert process.returncode is None, (folder / "log").read_text()[-2000:]
                    await asyncio.sleep(0.2)
            yield mesh, port
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def answers(port: int) -> bool:
    """Return whether a request to *port* is answered."""
    async with open_channel(f"127.0.0.1:{port}") as channel:
        start: Any = channel.unary_stream(GENERATE)
        call = start(chat("x", max_tokens=1).SerializeToString(), timeout=10)
        try:
            return bool([response async for response in call])
        except grpc.aio.AioRpcError:
            return False


async def closed(one: Peer) -> bool:
    """Return whether the server closes the connection in time."""
    async with asyncio.timeout(PATIENCE):
        await one.closed.wait()
    return True


async def test_an_answer_passes_and_other_services_do_not(edge: tuple[Mesh, int]) -> None:
    _, port = edge
    assert await answers(port)
    async with peer(port) as one:
        paths = (
            "/headrace.v1.AdminService/Inspect",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        )
        streams = [await one.call(headers(path), message(b"")) for path in paths]
        await one.answered(streams)

        assert [one.outcome(stream) for stream in streams] == ["UNIMPLEMENTED"] * len(paths)


@pytest.mark.parametrize("flood", ["rapid reset", "pings", "settings", "continuation"])
async def test_a_flood_of_frames_ends_its_connection(edge: tuple[Mesh, int], flood: str) -> None:
    _, port = edge
    async with peer(port) as one:
        await one.call(headers(GENERATE), None)  # which stays open, so that the connection is never idle
        stream = one.stream()
        if flood == "continuation":
            await one.send(frame(HEADERS, 0, stream, one.block(headers(GENERATE))))
        async with asyncio.timeout(PATIENCE):
            for number in range(1_000):
                if one.closed.is_set() or one.goaway is not None:
                    break
                if flood == "rapid reset":
                    stream = one.stream()
                    body = message(chat("x", max_tokens=4).SerializeToString())
                    sent = opened(stream, one.block(headers(GENERATE)), body)
                    await one.send(sent + frame(RST_STREAM, 0, stream, struct.pack(">I", 8)))
                elif flood == "continuation":
                    await one.send(frame(CONTINUATION, 0, stream, one.block([(f"x-{number}", "v" * 900)])))
                else:
                    one_frame = frame(PING, 0, 0, b"12345678") if flood == "pings" else frame(SETTINGS)
                    await one.send(one_frame * 2_000)
                await asyncio.sleep(0)
        assert one.goaway is not None or await closed(one)

    assert await answers(port)


async def test_silent_and_idle_connections_are_closed(edge: tuple[Mesh, int]) -> None:
    _, port = edge
    async with peer(port) as idle, peer(port) as slow:
        stream = slow.stream()
        await slow.send(frame(HEADERS, 0, stream, slow.block(headers(GENERATE))))  # without their end

        await slow.answered([stream], seconds=PATIENCE)
        assert slow.outcome(stream) != "open"
        assert await closed(idle)


async def test_connections_beyond_the_limit_are_closed(edge: tuple[Mesh, int]) -> None:
    _, port = edge
    async with AsyncExitStack() as stack:
        writers, ended = [], 0
        for _ in range(2 * MOST_CONNECTIONS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            writer.write(PREFACE + frame(SETTINGS))
            writers.append((reader, writer))
        for reader, _ in writers:
            try:
                ended += await asyncio.wait_for(reader.read(1), PATIENCE) == b""
            except ConnectionError:
                ended += 1

        assert ended >= MOST_CONNECTIONS - 2
