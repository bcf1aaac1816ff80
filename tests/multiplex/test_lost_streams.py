"""A stream that is lost ends all its calls, and the client resumes each answer on another one."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from headrace import errors
from headrace.client import Client
from headrace.multiplex import calling
from headrace.v1 import multiplex_pb2 as wire
from tests.harness import PATIENCE, collect, eventually, prompt
from tests.multiplex.scripted import Script, ServerStream, echo, echoed, scripted

CALLS = 40


def begins_and(ends: str) -> Script:
    """Return a script that sends two tokens of each answer and then ends in a way."""

    async def script(stream: ServerStream) -> None:
        for opened in await stream.welcome(CALLS):
            await stream.write(events=echoed(opened, 2))
        match ends:
            case "ok":
                return
            case "garbage":
                await stream.write(b"\xff\xff\xff")
                await stream.hang()
            case "silence":
                await stream.hang()
            case code:
                await stream.fail(grpc.StatusCode[code])

    return script


LOSSES = ["UNAVAILABLE", "CANCELLED", "ok", "garbage", "silence"]


async def ask(client: Client, count: int = CALLS) -> list[str]:
    """Send requests at once and return the texts of their answers."""
    answers = await asyncio.gather(*(collect(client, prompt(f"number {n}")) for n in range(count)))
    return [answer.text for answer in answers]


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_lost_stream_is_resumed_call_by_call(loss: str) -> None:
    async with scripted(begins_and(loss), echo) as server, server.client(stall_seconds=1) as client:
        assert await ask(client) == [f"number {n}" for n in range(CALLS)]

    assert len(server.streams) == 2
    assert {len(opened.request.resume.token_ids) for opened in server.streams[1].opened} == {2}
    assert {opened.request.resume.attempt for opened in server.streams[1].opened} == {1}
    assert not server.calls


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_lost_stream_fails_every_call_on_it(loss: str) -> None:
    async def attempt(client: Client) -> errors.HeadraceError | None:
        try:
            async for _ in client.generate(prompt("abcdef"), resume=False):
                pass
        except errors.HeadraceError as error:
            return error
        return None

    async with scripted(begins_and(loss)) as server, server.client(stall_seconds=1) as client:
        failures = await asyncio.gather(*(attempt(client) for _ in range(CALLS)))

    expected = errors.RequestCancelled if loss == "CANCELLED" else errors.Unavailable
    assert {type(failure) for failure in failures} == {expected}
    assert len({id(failure) for failure in failures}) == CALLS, "an error of its own for each"


async def test_a_stream_that_is_lost_before_any_event_is_retried() -> None:
    async def script(stream: ServerStream) -> None:
        await stream.welcome(CALLS)
        await stream.fail()

    async with scripted(script, echo) as server, server.client(retries=1) as client:
        assert await ask(client) == [f"number {n}" for n in range(CALLS)]


async def test_a_stream_that_ends_while_the_caller_writes_is_lost_and_nothing_else() -> None:
    """grpc.aio reports INTERNAL if the server's status arrives during a write."""

    async def script(stream: ServerStream) -> None:
        message = await stream.read()
        await stream.write(welcome=wire.MultiplexWelcome(epoch=message.hello.epoch))
        for _ in range(10):
            for opened in message.open:
                await stream.write(events=echoed(opened))
            message = await stream.read()
        await stream.fail()

    async def keep_asking(client: Client, seen: set[type[Exception]]) -> None:
        while len(server.streams) < 60:
            try:
                async for _ in client.generate(prompt("x" * 9), timeout=PATIENCE):
                    pass
            except errors.HeadraceError as error:
                seen.add(type(error))

    seen: set[type[Exception]] = set()
    async with scripted(script) as server, server.client() as client:
        await asyncio.gather(*(keep_asking(client, seen) for _ in range(50)))

    assert seen == {errors.Unavailable}


@pytest.mark.parametrize(
    "first",
    [
        {"welcome": wire.MultiplexWelcome(epoch=99)},
        {"pong": 1},
        {"events": [wire.MultiplexEvent(handle=1)]},
    ],
    ids=["wrong epoch", "no welcome", "events"],
)
async def test_a_stream_without_its_welcome_is_lost(first: dict[str, Any]) -> None:
    async def script(stream: ServerStream) -> None:
        await stream.read()
        await stream.write(**first)
        await stream.hang()

    async with scripted(script) as server, server.client() as client:
        with pytest.raises(errors.Unavailable):
            await collect(client, prompt("abc"))


async def test_a_server_that_answers_pings_is_not_lost() -> None:
    """The stream is silent for longer than `stall_seconds`, but for its pongs."""
    more = asyncio.Event()

    async def script(stream: ServerStream) -> None:
        (opened,) = await stream.welcome()
        await stream.read_until(lambda: len([message for message in stream.messages if message.ping]) == 2)
        await stream.write(events=echoed(opened))
        more.set()
        await stream.hang()

    async with scripted(script) as server, server.client(stall_seconds=1) as client:
        assert (await collect(client, prompt("abc"))).text == "abc"

    assert more.is_set()
    assert len(server.streams) == 1


async def test_a_stream_without_calls_is_neither_pinged_nor_lost() -> None:
    async with scripted(echo) as server, server.client(stall_seconds=1) as client:
        await collect(client, prompt("abc"))
        (stream,) = server.streams
        checked = len(stream.messages)
        await asyncio.sleep(1.6)  # longer than a ping and a stall take
        await collect(client, prompt("abc"))

    assert len(server.streams) == 1
    assert all(not message.ping for message in stream.messages[:checked])


async def test_a_stream_that_violates_the_rules_in_the_servers_eyes_fails_as_the_request_does() -> None:
    async def script(stream: ServerStream) -> None:
        await stream.welcome()
        await stream.fail(grpc.StatusCode.INVALID_ARGUMENT, "no")

    async with scripted(script) as server, server.client(retries=2) as client:
        with pytest.raises(errors.InvalidRequest):
            await collect(client, prompt("abc"))


async def test_a_server_without_multiplex_gets_calls_instead() -> None:
    async with scripted(None) as server, server.client() as client:
        assert await ask(client) == [f"number {n}" for n in range(CALLS)]
        assert len(server.calls) == CALLS
        await collect(client, prompt("abc"), timeout=PATIENCE)

    assert len(server.streams) == 1, "not tried again for each call"


async def test_calls_that_come_one_after_another_find_out_that_multiplex_is_not_offered() -> None:
    """The server's status may arrive during any write, so there is only one before the welcome."""

    async def ask_later(client: Client, turns: int) -> str:
        for _ in range(turns):
            await asyncio.sleep(0)
        return (await collect(client, prompt("abc"))).text

    for _ in range(10):
        async with scripted(None) as server, server.client() as client:
            texts = await asyncio.gather(*(ask_later(client, turns) for turns in range(60)))

        assert texts == ["abc"] * 60


async def test_a_server_without_multiplex_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "OFFERED_AGAIN_SECONDS", 0.0)
    async with scripted(None, echo) as server, server.client() as client:
        assert await ask(client) == [f"number {n}" for n in range(CALLS)]
        assert await ask(client) == [f"number {n}" for n in range(CALLS)]

    assert len(server.calls) == CALLS
    assert len(server.streams[1].opened) == CALLS


async def test_a_call_instead_of_the_stream_has_the_same_metadata_and_can_be_cancelled() -> None:
    async with scripted(None) as server, server.client() as client:
        stream = client.generate(prompt("wait"), timeout=PATIENCE, metadata={"x-shop": "7"})
        await anext(stream)
        await eventually(lambda: server.waiting)
        await stream.aclose()
        await eventually(lambda: not server.waiting)

    assert server.metadata[0]["x-shop"] == "7"
