"""A stream ends when its caller is done, or the server has drained; no request is left without an end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from tests.harness import eventually
from tests.multiplex.raw import HELLO, opened, server


async def test_half_closing_answers_the_rest_and_ends_with_ok() -> None:
    async with server() as served, served.stream() as caller:
        await caller.open("abc", "de", "f")
        await caller.call.done_writing()

        assert await caller.to_the_end() is None
        assert caller.text == {1: "abc", 2: "de", 3: "f"}
        assert all(caller.ended(handle) for handle in (1, 2, 3))


async def test_half_closing_without_requests_ends_with_ok() -> None:
    async with server() as served, served.stream() as caller:
        await caller.call.done_writing()

        assert await caller.to_the_end() is None
        assert caller.epochs == [HELLO.epoch]


async def test_a_half_closed_stream_needs_no_more_credit_and_waits_for_its_deadlines() -> None:
    async with server() as served, served.stream() as caller:
        await caller.send(open=[opened(1, "abc", credit=1), opened(2, "wait", ttl=0.1)])
        await caller.call.done_writing()

        assert await caller.to_the_end() is None
        assert caller.text[1] == "abc"
        assert caller.reason(2) == "DEADLINE"


async def test_a_draining_server_rejects_new_requests_and_completes_the_others() -> None:
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(server(drain_seconds=60))
        caller = await stack.enter_async_context(served.stream())
        await caller.open("abcdef", credit=3)
        await caller.read_until(lambda: len(caller.events[1]) == 3)

        served.serving.requests.drain()
        await caller.read_until(lambda: caller.draining)
        await caller.open("late", first=2)
        await caller.answers(2)
        await caller.send(credit=[{"handle": 1, "events": 99}])

        assert await caller.to_the_end() is None
        assert caller.reason(2) == "DRAINING"
        assert caller.text[1] == "abcdef"
        assert not caller.ends.keys() & {1}


async def test_a_draining_server_ends_a_stream_without_requests() -> None:
    async with server() as served, served.stream() as caller:
        await caller.read_until(lambda: caller.epochs)
        served.serving.requests.drain()

        assert await caller.to_the_end() is None
        assert caller.draining


async def test_requests_that_remain_at_the_end_of_the_drain_get_draining() -> None:
    async with AsyncExitStack() as outer:
        async with server(drain_seconds=0.05) as served:
            caller = await outer.enter_async_context(served.stream())
            await caller.open("wait", "abc", "wait")
            await caller.open("abc", first=4, credit=1)
            await caller.read_until(lambda: len(caller.events) == 4)
            reading = asyncio.create_task(caller.to_the_end())

        assert await reading is None
        assert caller.draining
        assert [caller.reason(n) for n in (1, 2, 3, 4)] == ["DRAINING", "", "DRAINING", "DRAINING"]
        assert caller.text[2] == "abc"


async def test_a_stopped_server_keeps_nothing_of_a_stream_that_is_not_read() -> None:
    async with AsyncExitStack() as outer:
        async with server(drain_seconds=0.05) as served:
            caller = await outer.enter_async_context(served.stream())
            await caller.open(*["fill"] * 20)
            await eventually(lambda: served.echo.running == 20)

        assert not served.echo.running
        assert not served.serving.requests.in_flight
