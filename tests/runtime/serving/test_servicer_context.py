"""The status of a streaming RPC reaches the caller whenever the RPC fails."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from headrace import errors, statuses
from headrace.channel import open_channel
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.interceptor import ServerInterceptor

SECONDS = 20.0
SERVICE = "headrace.test.Stream"

Handler = Callable[[bytes, Any], Any]


@asynccontextmanager
async def served(handler: Handler) -> AsyncGenerator[tuple[int, ActiveRequests], None]:
    """A server whose one streaming method is *handler*."""
    calls = Calls()
    server = grpc.aio.server(interceptors=[ServerInterceptor(calls)])
    method: Any = grpc.unary_stream_rpc_method_handler(handler, request_deserializer=bytes)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Go": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port, calls.requests
    finally:
        await server.stop(0)


async def ends(port: int, calls: int) -> Counter[str]:
    """Make concurrent calls and count how they end."""

    async def one() -> str:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            method: Any = channel.unary_stream(f"/{SERVICE}/Go")
            try:
                async for _ in method(b"", timeout=SECONDS):
                    pass
            except grpc.aio.AioRpcError as error:
                return statuses.from_rpc_error(error).reason
            return "OK"

    return Counter(await asyncio.gather(*(one() for _ in range(calls))))


async def test_an_error_during_the_first_message_reaches_the_caller() -> None:
    async def handler(request: bytes, context: Any) -> None:
        writing = asyncio.create_task(context.write(b"first"))
        await asyncio.sleep(0)
        writing.cancel()
        raise errors.NotReady("failed while the first message was written")

    async with served(handler) as (port, _):
        assert await ends(port, 20) == {"NOT_READY": 20}


@pytest.mark.parametrize("turns", range(4))
async def test_a_call_that_is_evicted_during_its_first_message_ends_as_draining(turns: int) -> None:
    """At any stage of the message."""
    written = 0

    async def handler(request: bytes, context: Any) -> None:
        nonlocal written
        task = asyncio.current_task()
        assert task is not None
        asyncio.create_task(evict(task))  # noqa: RUF006
        for _ in range(1000):
            await context.write(b"x" * 1000)
            written += 1
            await asyncio.sleep(0.001)

    async def evict(task: asyncio.Task[Any]) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        requests._evicting = True
        task.cancel()

    async with served(handler) as (port, requests):
        assert await ends(port, 20) == {"DRAINING": 20}


async def test_a_stream_that_writes_nothing_ends_well() -> None:
    async def handler(request: bytes, context: Any) -> None:
        return

    async with served(handler) as (port, _):
        assert await ends(port, 3) == {"OK": 3}


async def test_a_caller_that_leaves_during_a_write_is_not_a_server_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    written = asyncio.Event()
    over = asyncio.Event()

    async def handler(request: bytes, context: Any) -> None:
        await context.write(b"first")
        written.set()
        try:
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:  # the caller left during this write
            over.set()
            await context.write(b"second")

    async with served(handler) as (port, requests):
        async with open_channel(f"127.0.0.1:{port}") as channel:
            method: Any = channel.unary_stream(f"/{SERVICE}/Go")
            call = method(b"", timeout=SECONDS)
            await written.wait()
            call.cancel()
            await asyncio.wait_for(over.wait(), SECONDS)
        async with asyncio.timeout(SECONDS):
            while requests.in_flight:
                await asyncio.sleep(0.01)

    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
