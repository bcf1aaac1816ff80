"""Calls start in a fair order, all of them, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from headrace.channel import open_channel
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.runtime.serving.fair_semaphore import FairSemaphore
from headrace.runtime.serving.inflight import InflightBudget
from headrace.runtime.serving.interceptor import LONG_BYTES, ServerInterceptor
from headrace.runtime.serving.limits import Limits

PERMITS = 32


async def test_a_flood_of_one_connection_does_not_hold_up_another() -> None:
    semaphore, started, running = FairSemaphore(PERMITS), list[str](), 0

    async def call(connection: str) -> None:
        nonlocal running
        permit = await semaphore.acquire(connection)
        started.append(connection)
        running += 1
        assert running <= PERMITS
        await asyncio.sleep(0)
        running -= 1
        permit.release()
        permit.release()

    calls = [asyncio.create_task(call("flood")) for _ in range(1000)]
    calls.append(asyncio.create_task(call("honest")))
    await asyncio.gather(*calls)

    assert started.index("honest") <= 2 * PERMITS
    assert len(started) == 1001
    assert semaphore._free == PERMITS


async def test_calls_that_are_cancelled_while_they_wait_lose_no_turn() -> None:
    semaphore = FairSemaphore(PERMITS)

    async def call() -> None:
        (await semaphore.acquire("a")).release()

    held = [await semaphore.acquire("a") for _ in range(PERMITS)]
    waiting = [asyncio.create_task(call()) for _ in range(100)]
    await asyncio.sleep(0)
    held[0].release()
    waiting[0].cancel()  # in the same moment as it is given its turn
    for task in waiting[1::2]:
        task.cancel()
    for permit in held[1:]:
        permit.release()
    await asyncio.wait(waiting, timeout=5)

    assert sum(task.cancelled() for task in waiting) == 51
    assert semaphore._free == PERMITS
    assert not semaphore._waiting


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

    server = grpc.aio.server(interceptors=[ServerInterceptor(ActiveRequests(), InflightBudget(Limits()))])
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
