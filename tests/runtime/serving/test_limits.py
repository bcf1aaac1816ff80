"""What a server holds for its callers is bounded, and what is too much is refused in its own words."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import resource
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace import errors
from headrace.channel import CHANNEL_OPTIONS, open_channel
from headrace.client import Client
from headrace.runtime.memory_reclaim import Reclaimer
from headrace.runtime.serving import accept_loop, limits
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Mesh, collect, prompt, running_mesh
from tests.hostile.wire import DATA, GENERATE, frame, headers, message, peer

MIB = limits.MIB
VALID = message(prompt("x").SerializeToString())


@pytest.fixture(scope="module")
async def small() -> AsyncGenerator[Mesh, None]:
    """A mesh whose router holds little."""
    held = {"max_calls": 16, "max_message_megabytes": 1.0, "max_inflight_megabytes": 4.0}
    async with running_mesh(
        "only", engine=lambda: EchoEngine(step_seconds=0.02), router_settings=held
    ) as mesh:
        yield mesh


async def status(port: int, path: bytes | str, body: bytes | None, *more: tuple[str, str]) -> str:
    """How one call by hand ends."""
    async with peer(port) as one:
        stream = await one.call(headers(path, *more), body)
        await one.answered([stream], seconds=PATIENCE)
        return one.outcome(stream)


def endless() -> Any:
    return prompt("x", max_tokens=2000, ignore_eos=True)


@pytest.mark.parametrize(
    "path", [b"/\xff\xfe/x", b"/headrace.v1.GenerationService/\xc3", b"\xff", b"/", b"//"]
)
async def test_a_path_that_is_not_utf_8_does_not_stop_the_server(small: Mesh, path: bytes) -> None:
    assert accept_loop.GUARDED
    assert await status(small.port, path, VALID) == "UNIMPLEMENTED"

    assert (await collect(small.client, prompt("still there"))).text == "still there"


async def test_what_is_compressed_is_refused_before_it_is_inflated(small: Mesh) -> None:
    packed = gzip.compress(b"x" * 64 * MIB)

    assert (
        await status(small.port, GENERATE, message(packed, compressed=True), ("grpc-encoding", "gzip"))
        == "UNIMPLEMENTED"
    )


async def test_a_connection_with_too_many_calls_is_refused_and_another_is_not(small: Mesh) -> None:
    async with AsyncExitStack() as stack:
        # Channels of one process to one target share a connection, unless their options differ.
        alone = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{small.port}", options=alone)
        greedy = await stack.enter_async_context(Client(channel, retries=0))
        for _ in range(8):
            running = await stack.enter_async_context(aclosing(greedy.generate(endless(), timeout=PATIENCE)))
            await anext(running)

        with pytest.raises(errors.Busy, match="this connection") as caught:
            await collect(greedy, prompt("one more"))
        assert caught.value.retry_after
        assert (await collect(small.client, prompt("another"))).text == "another"
        async with open_channel(f"127.0.0.1:{small.port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = await stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=PATIENCE)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_messages_that_do_not_end_are_charged_until_there_is_no_room(small: Mesh) -> None:
    almost = message(b"x" * 500_000)[:-1]
    async with peer(small.port) as one:
        streams = [await one.call(headers(GENERATE), None) for _ in range(6)]
        for stream in streams:
            await one.body(stream, almost, end=False)
        while sum(one.answers[stream].ended for stream in streams) < 5:
            await asyncio.sleep(0.01)
        outcomes = sorted(one.outcome(stream) for stream in streams)
        assert outcomes == ["RESOURCE_EXHAUSTED"] * 5 + ["open"]  # 1 MiB each, of half of half of 4
        assert (await collect(small.client, prompt("meanwhile"))).text == "meanwhile"


async def test_a_message_beyond_the_limit_is_too_large(small: Mesh) -> None:
    with pytest.raises(errors.MessageTooLarge):
        await collect(small.client, prompt("x" * (MIB + 1)))


@pytest.mark.parametrize(
    "path",
    [
        GENERATE,
        "/headrace.v1.RoutingService/Explain",
        "/headrace.v1.AdminService/Inspect",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.channelz.v1.Channelz/GetServers",
    ],
)
async def test_bytes_that_are_no_message_are_the_callers_fault_and_no_line_in_the_log(
    small: Mesh, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert await status(small.port, path, message(b"\xff" * 40)) == "INVALID_ARGUMENT"

    assert not caplog.records


async def test_a_method_that_a_servicer_does_not_have_is_unimplemented(small: Mesh) -> None:
    assert await status(small.port, "/grpc.health.v1.Health/List", message(b"")) == "UNIMPLEMENTED"


async def test_a_call_without_a_message_is_told_so(small: Mesh) -> None:
    assert await status(small.port, GENERATE, b"") == "INVALID_ARGUMENT"


async def test_headers_beyond_the_limit_are_refused(small: Mesh) -> None:
    assert await status(small.port, GENERATE, VALID, ("x-note", "n" * 4_000)) == "OK"
    assert await status(small.port, GENERATE, VALID, ("x-note", "n" * 16_000)) in (
        "RESOURCE_EXHAUSTED",
        "reset",
        "closed",
    )


async def test_a_call_whose_caller_is_gone_before_it_is_read_leaves_nothing(small: Mesh) -> None:
    async with peer(small.port) as one:
        for _ in range(5):
            stream = await one.call(headers(GENERATE), None)
            await one.send(frame(DATA, 0, stream, VALID[:3]))
    await asyncio.sleep(0)

    assert (await collect(small.client, prompt("x"))).text == "x"


def test_a_process_takes_as_many_open_files_as_it_may() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = (
        "import json, resource; from headrace.runtime.serving.limits import raise_file_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))\n"
        "raise_file_limit(); print(json.dumps(resource.getrlimit(resource.RLIMIT_NOFILE)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert json.loads(out.stdout) == [hard, hard]


async def test_frames_that_an_error_came_through_are_freed_once_much_has_been_released() -> None:
    class Long:
        alive = 0

        def __init__(self) -> None:
            Long.alive += 1

        def __del__(self) -> None:
            Long.alive -= 1

    def fail() -> None:
        text = Long()
        try:
            raise errors.InvalidRequest("no")
        except errors.InvalidRequest as error:
            kept = [error, text]
            kept.append(kept)

    fail()
    assert Long.alive == 1

    reclaimer = Reclaimer()
    for _ in range(9):
        reclaimer.released(MIB)
    async with asyncio.timeout(PATIENCE):
        while Long.alive:
            await asyncio.sleep(0.02)


def test_the_core_knows_the_options() -> None:
    """A name that core does not know is ignored without a word: each must be in its code."""
    from grpc._cython import cygrpc

    with open(cygrpc.__file__, "rb") as library:
        code = library.read()
    for name, _ in limits.Limits().options():
        assert name.encode() in code, name
