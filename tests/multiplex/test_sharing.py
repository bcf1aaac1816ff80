"""Calls on a shared stream are sent together, and each behaves as a call of its own."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import grpc
import pytest

from headrace import errors
from headrace.client import Client
from headrace.multiplex import calling
from headrace.multiplex.calling import FEW_CALLS
from headrace.multiplex.limits import LARGE_BYTES, MAX_OPENS, MESSAGE_BYTES
from headrace.multiplex.shared_stream import WATCH_SECONDS
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import multiplex_pb2 as wire
from tests.harness import PATIENCE, collect, eventually, prompt
from tests.multiplex.scripted import ServerStream, echo, echoed, failed, scripted


async def ask(client: Client, *texts: str) -> list[str]:
    """Send requests at once and return the texts of their answers."""
    answers = await asyncio.gather(*(collect(client, prompt(text)) for text in texts))
    return [answer.text for answer in answers]


async def hang(stream: ServerStream) -> None:
    """Accept every request, read everything and send nothing more than pongs."""
    await stream.welcome()
    answered = 0
    while True:
        for opened in stream.opened[answered:]:
            await stream.write(events=echoed(opened, 0))
        answered = len(stream.opened)
        await stream.read()


async def test_requests_of_one_moment_travel_in_one_message() -> None:
    async with scripted(echo) as server, server.client() as client:
        assert await ask(client, *(f"number {n}" for n in range(50))) == [f"number {n}" for n in range(50)]

    (stream,) = server.streams
    assert len(stream.messages[0].open) == 50
    assert stream.messages[0].hello.epoch == 1
    assert stream.messages[0].hello.caller_id


async def test_hundreds_of_requests_are_split_into_messages_within_the_limits() -> None:
    texts = [f"number {n}" for n in range(3 * MAX_OPENS)] + ["x" * 50_000 + f"{n}" for n in range(20)]
    async with scripted(hang) as server, server.client() as client:
        tasks = [asyncio.create_task(first_event(client, text)) for text in texts]
        await asyncio.gather(*tasks)

    (stream,) = server.streams
    assert [opened.handle for opened in stream.opened] == list(range(1, len(texts) + 1))
    assert [opened.request.prompt for opened in stream.opened] == texts
    assert max(len(message.open) for message in stream.messages) == MAX_OPENS
    assert max(message.ByteSize() for message in stream.messages) < MESSAGE_BYTES + LARGE_BYTES


async def first_event(client: Client, text: str) -> None:
    """Send a request, and leave after `accepted`."""
    async with aclosing(client.generate(prompt(text), timeout=PATIENCE)) as stream:
        await anext(stream)


async def test_a_large_request_is_a_call_of_its_own() -> None:
    small, large = "x" * (LARGE_BYTES - 200), "x" * LARGE_BYTES
    async with scripted(echo) as server, server.client() as client:
        await first_event(client, small)
        await first_event(client, large)

    assert [call.prompt for call in server.calls] == [large]
    assert [opened.request.prompt for opened in server.streams[0].opened] == [small]


async def test_the_fifth_call_at_a_time_opens_the_stream_and_later_calls_use_it() -> None:
    async with scripted(echo) as server, server.client(multiplex=None) as client:
        waiting = [client.generate(prompt("wait"), timeout=PATIENCE) for _ in range(FEW_CALLS)]
        for stream in waiting:
            await anext(stream)
        assert len(server.calls) == FEW_CALLS
        assert not server.streams

        assert await ask(client, "fifth") == ["fifth"]
        for stream in waiting:
            await stream.aclose()
        assert await ask(client, "alone") == ["alone"]

    assert [opened.request.prompt for opened in server.streams[0].opened] == ["fifth", "alone"]


async def test_an_idle_stream_is_closed_unless_the_caller_asked_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calling, "IDLE_SECONDS", WATCH_SECONDS)
    async with scripted(echo) as server, server.client(multiplex=None) as client:
        texts = [f"number {n}" for n in range(FEW_CALLS + 1)]
        assert await ask(client, *texts) == texts
        (stream,) = server.streams
        await eventually(lambda: stream.half_closed)
        before = len(server.calls)
        assert await ask(client, "alone") == ["alone"]
        assert len(server.calls) == before + 1

    async with scripted(echo) as server, server.client(multiplex=True) as client:
        await ask(client, "alone")
        await asyncio.sleep(3 * WATCH_SECONDS)
        assert not server.streams[0].half_closed


async def test_multiplexing_can_be_switched_off() -> None:
    async with scripted(echo) as server, server.client(multiplex=False) as client:
        await ask(client, *["abc"] * 20)

    assert len(server.calls) == 20
    assert not server.streams


async def test_events_of_unknown_handles_are_ignored() -> None:
    async def script(stream: ServerStream) -> None:
        (opened,) = await stream.welcome()
        strangers = [wire.MultiplexEvent(handle=n, response=pb.GenerateResponse()) for n in (0, 2, 2**32 - 1)]
        events = echoed(opened)
        await stream.write(events=[*strangers, *events, *events, failed(1, grpc.StatusCode.INTERNAL)])
        await stream.write(events=[failed(99, grpc.StatusCode.INTERNAL)])
        await stream.hang()

    async with scripted(script) as server, server.client() as client:
        answer = await collect(client, prompt("abc"))

    assert answer.text == "abc"


async def test_events_of_an_unknown_kind_are_ignored() -> None:
    """A later version may send them."""

    async def script(stream: ServerStream) -> None:
        (opened,) = await stream.welcome()
        unknown = wire.MultiplexEvent(handle=opened.handle)
        for event in echoed(opened):
            await stream.write(events=[unknown, event])
        await stream.hang()

    async with scripted(script) as server, server.client() as client:
        assert (await collect(client, prompt("abc"))).text == "abc"


async def test_an_error_ends_its_call_alone() -> None:
    async def script(stream: ServerStream) -> None:
        first, second = await stream.welcome(2)
        await stream.write(events=[failed(first.handle, grpc.StatusCode.RESOURCE_EXHAUSTED), *echoed(second)])
        await stream.hang()

    async with scripted(script) as server, server.client() as client:
        first, second = await asyncio.gather(
            collect(client, prompt("abc")), collect(client, prompt("def")), return_exceptions=True
        )

    assert isinstance(first, errors.Overloaded)
    assert not isinstance(second, BaseException)
    assert second.text == "def"


async def test_the_deadline_and_the_metadata_reach_the_server() -> None:
    async with scripted(echo) as server, server.client() as client:
        async for _ in client.generate(prompt("a"), timeout=50, metadata={"x-shop": "7"}):
            pass
        async for _ in client.generate(prompt("b")):
            pass

    timed, timeless = server.streams[0].opened
    assert 40 < timed.ttl.ToNanoseconds() / 1e9 <= 50
    assert timed.metadata["x-shop"] == "7"
    assert not timeless.HasField("ttl")


async def test_a_deadline_holds_without_the_servers_help() -> None:
    async with scripted(hang) as server, server.client() as client:
        with pytest.raises(errors.DeadlineExceeded):
            await collect(client, prompt("abc"), timeout=0.05)
        (stream,) = server.streams
        await eventually(lambda: stream.cancelled == [1])


async def test_closing_the_generator_cancels_the_request() -> None:
    async with scripted(hang) as server, server.client() as client:
        generators = [client.generate(prompt("abc"), timeout=PATIENCE) for _ in range(30)]
        for generator in generators:
            await anext(generator)
        for generator in generators[::2]:
            await generator.aclose()
        (stream,) = server.streams
        await eventually(lambda: len(stream.cancelled) == 15)

        assert stream.cancelled == list(range(1, 31, 2))
        for generator in generators[1::2]:
            await generator.aclose()


async def test_cancelling_the_task_that_waits_for_an_event_cancels_the_request() -> None:
    async with scripted(hang) as server, server.client() as client:
        tasks = [asyncio.create_task(collect(client, prompt("abc"))) for _ in range(10)]
        await eventually(lambda: server.streams and len(server.streams[0].opened) == 10)
        for task in tasks[:5]:
            task.cancel()
        await asyncio.wait(tasks[:5])
        assert all(task.cancelled() for task in tasks[:5])
        await eventually(lambda: sorted(server.streams[0].cancelled) == [1, 2, 3, 4, 5])
        for task in tasks[5:]:
            task.cancel()
        await asyncio.wait(tasks)


async def test_a_request_that_is_cancelled_before_it_is_sent_ends_on_the_server() -> None:
    """Its opening and its cancellation may travel in one message."""
    async with scripted(hang) as server, server.client() as client:
        await first_event(client, "abc")
        task = asyncio.create_task(first_event(client, "def"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await first_event(client, "ghi")
        await eventually(lambda: len(server.streams[0].cancelled) == len(server.streams[0].opened))


async def test_requests_that_were_cancelled_before_they_were_sent_are_not_sent() -> None:
    """A caller may leave sooner than a server that does not read takes its request."""
    reads_on = asyncio.Event()

    async def script(stream: ServerStream) -> None:
        await stream.welcome()
        await reads_on.wait()
        await stream.read_until(lambda: stream.opened[-1].request.prompt == "last")
        await stream.hang()

    async def leave_soon(client: Client) -> None:
        task = asyncio.create_task(collect(client, prompt("x" * 50_000)))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    async with scripted(script) as server, server.client() as client:
        waiting = asyncio.create_task(collect(client, prompt("first")))
        await eventually(lambda: server.streams and server.streams[0].opened)
        for _ in range(200):
            await leave_soon(client)
        last = asyncio.create_task(collect(client, prompt("last")))
        await asyncio.sleep(0)
        reads_on.set()
        (stream,) = server.streams
        await eventually(lambda: stream.opened[-1].request.prompt == "last")

        assert len(stream.opened) < 100
        assert len(stream.cancelled) <= len(stream.opened) - 2
        waiting.cancel()
        last.cancel()
        await asyncio.wait([waiting, last])


async def test_closing_the_client_ends_its_calls() -> None:
    async with scripted(hang) as server, server.client() as client:
        tasks = [asyncio.create_task(collect(client, prompt("abc"))) for _ in range(20)]
        await eventually(lambda: server.streams and len(server.streams[0].opened) == 20)
        await client.close()
        done, _ = await asyncio.wait(tasks, timeout=PATIENCE)

    assert len(done) == 20
    assert all(task.cancelled() or isinstance(task.exception(), errors.HeadraceError) for task in done)


async def test_failing_all_calls_ends_those_on_the_stream() -> None:
    class Lost(Exception):
        pass

    async with scripted(hang) as server, server.client() as client:
        tasks = [asyncio.create_task(collect(client, prompt("abc"))) for _ in range(20)]
        await eventually(lambda: server.streams and len(server.streams[0].opened) == 20)
        client.fail_calls(Lost())
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await eventually(lambda: len(server.streams[0].cancelled) == 20)

    assert {type(result) for result in results} == {Lost}


async def test_calls_after_draining_use_another_stream_and_the_others_continue() -> None:
    continues = asyncio.Event()

    async def script(stream: ServerStream) -> None:
        (opened,) = await stream.welcome()
        await stream.write(events=echoed(opened, 0), draining=True)
        await continues.wait()
        await stream.write(events=echoed(opened)[1:])

    async with scripted(script, echo) as server, server.client() as client:
        first = client.generate(prompt("first"), timeout=PATIENCE)
        await anext(first)
        assert await ask(client, "second") == ["second"]
        continues.set()
        text = "".join([response.delta.text async for response in first])

    assert text == "first"
    assert [[opened.request.prompt for opened in stream.opened] for stream in server.streams] == [
        ["first"],
        ["second"],
    ]
    assert server.streams[1].messages[0].hello.epoch == 2


async def test_a_request_without_time_left_ends_at_once() -> None:
    async with scripted(hang) as server, server.client() as client:
        began = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            await collect(client, prompt("abc"), timeout=0.0)

    assert time.monotonic() - began < PATIENCE
