"""Calls beyond the limits are rejected, others and probes are served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace import errors
from headrace.channel import CHANNEL_OPTIONS, open_channel
from headrace.client import Client
from headrace.runtime.serving.calls import Calls
from headrace.runtime.serving.interceptor import LONG_BYTES, ServerInterceptor
from tests.harness import PATIENCE, Mesh, collect, prompt
from tests.hostile.wire import message
from tests.runtime.serving.by_hand import status


def endless() -> Any:
    return prompt("x", max_tokens=2000, ignore_eos=True)


async def test_a_connection_with_too_many_calls_is_rejected_and_another_is_not(
    small: Mesh, count: Callable[..., float]
) -> None:
    refused = count("headrace.requests.refused", error="SERVER_BUSY")
    async with AsyncExitStack() as stack:
        # Channels of one process to one target share a connection, unless their options differ.
        alone = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{small.port}", options=alone)
        greedy = await stack.enter_async_context(Client(channel, retries=0, multiplex=False))
        for _ in range(8):
            running = await stack.enter_async_context(aclosing(greedy.generate(endless(), timeout=PATIENCE)))
            await anext(running)

        with pytest.raises(errors.Busy, match="this connection") as caught:
            await collect(greedy, prompt("one more"))
        assert caught.value.retry_after
        assert count("headrace.requests.refused", error="SERVER_BUSY") == refused + 1
        assert (await collect(small.client, prompt("another"))).text == "another"
        async with open_channel(f"127.0.0.1:{small.port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = await stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=PATIENCE)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_method_without_an_implementation_is_unimplemented(small: Mesh) -> None:
    assert await status(small.port, "/grpc.health.v1.Health/List", message(b"")) == "UNIMPLEMENTED"


async def test_long_messages_start_one_by_one_and_short_ones_between_them() -> None:
    running = {True: 0, False: 0}
    most = {True: 0, False: 0}

    async def start(request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
        long = len(request) >= LONG_BYTES
        running[long] += 1
        most[long] = max(most[long], running[long])
        for _ in range(20):
            await asyncio.sleep(0)
        running[long] -= 1
        yield b"started"

    server = grpc.aio.server(interceptors=[ServerInterceptor(Calls())])
    method: Any = grpc.unary_stream_rpc_method_handler(start, request_deserializer=bytes)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("headrace.test.Start", {"Go": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            go: Any = channel.unary_stream("/headrace.test.Start/Go")
            calls = [go(b"x" * LONG_BYTES, timeout=20) for _ in range(12)]
            calls += [go(b"x", timeout=20) for _ in range(12)]
            replies = await asyncio.gather(*(anext(aiter(call)) for call in calls))
    finally:
        await server.stop(0)

    assert replies == [b"started"] * 24
    assert most[True] == 1
    assert running == {True: 0, False: 0}
