"""A stream that violates the rules of Multiplex ends with INVALID_ARGUMENT; any other is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from headrace import errors
from headrace.multiplex import serving
from headrace.multiplex.limits import MAX_HANDLES, MAX_OPENS
from headrace.v1 import multiplex_pb2 as wire
from tests.harness import PATIENCE, eventually
from tests.multiplex.raw import HELLO, Server, opened, server


@pytest.fixture(scope="module")
async def served() -> AsyncGenerator[Server, None]:
    async with server() as running:
        yield running


async def test_the_welcome_repeats_the_epoch_and_comes_once(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("hi")
        await caller.answers(1)

    assert caller.epochs == [HELLO.epoch]


async def test_the_first_message_may_open_requests(served: Server) -> None:
    async with served.stream(hello=False) as caller:
        await caller.send(hello=HELLO, open=[opened(3, "abc"), opened(9, "de")])
        await caller.answers(3, 9)

    assert caller.text == {3: "abc", 9: "de"}
    assert caller.events[3] == ["accepted", "delta", "delta", "delta", "finish"]


async def test_a_first_message_without_hello_ends_the_stream(served: Server) -> None:
    async with served.stream(hello=False) as caller:
        await caller.open("hi")

        assert isinstance(await caller.to_the_end(), errors.InvalidRequest)
    assert not caller.events


async def test_a_stream_that_ends_before_its_first_message_has_no_hello(served: Server) -> None:
    async with served.stream(hello=False) as caller:
        await caller.call.done_writing()

        assert isinstance(await caller.to_the_end(), errors.InvalidRequest)


async def test_a_hello_that_does_not_come_ends_the_stream(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HELLO_SECONDS", 0.02)
    async with served.stream(hello=False) as caller:
        error = await caller.to_the_end()

    assert isinstance(error, errors.InvalidRequest)
    assert "hello" in error.message


@pytest.mark.parametrize(
    ("violation", "field"),
    [
        ({"hello": HELLO}, "hello"),
        ({"open": [opened(1, "hi")]}, "open.handle"),
        ({"open": [opened(0, "hi")]}, "open.handle"),
        ({"open": [opened(6, "hi"), opened(6, "hi")]}, "open.handle"),
        ({"open": [opened(10 + n, "hi") for n in range(MAX_OPENS + 1)]}, "open"),
        ({"cancel": range(MAX_HANDLES + 1)}, "cancel"),
        ({"credit": [wire.EventCredit(handle=n) for n in range(MAX_HANDLES + 1)]}, "credit"),
    ],
    ids=["second hello", "equal handle", "zero", "twice in one message", "opens", "cancels", "credits"],
)
async def test_a_violation_ends_the_stream_and_its_requests(
    served: Server, violation: dict[str, Any], field: str
) -> None:
    async with served.stream() as caller:
        await caller.open("wait")
        await caller.read_until(lambda: caller.events[1] == ["accepted"])
        await caller.send(**violation)

        error = await caller.to_the_end()
    assert isinstance(error, errors.InvalidRequest)
    assert error.field == field
    await eventually(lambda: not served.echo.running)


async def test_a_caller_id_has_a_limit(served: Server) -> None:
    async with served.stream(hello=False) as caller:
        await caller.send(hello=wire.MultiplexHello(caller_id="x" * 129, epoch=1))

        error = await caller.to_the_end()
    assert isinstance(error, errors.InvalidRequest)
    assert error.field == "hello.caller_id"


@pytest.mark.parametrize("first", [True, False])
async def test_a_message_that_cannot_be_parsed_ends_the_stream(served: Server, first: bool) -> None:
    async with served.stream(hello=not first) as caller:
        await caller.send(b"\xff\xff\xff")

        error = await caller.to_the_end()
    assert isinstance(error, errors.InvalidText)


async def test_a_message_may_have_as_many_entries_as_allowed(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open(*["a"] * MAX_OPENS)
        await caller.send(
            cancel=range(1000, 1000 + MAX_HANDLES),
            credit=[wire.EventCredit(handle=n, events=9) for n in range(1000, 1000 + MAX_HANDLES)],
        )
        await caller.answers(*range(1, MAX_OPENS + 1))

    assert not caller.ends


async def test_a_ping_is_answered_at_once_even_without_requests(served: Server) -> None:
    async with served.stream() as caller:
        await caller.send(ping=41)
        await caller.read_until(lambda: caller.pongs)
        await caller.send(ping=2**64 - 1)
        await caller.read_until(lambda: len(caller.pongs) == 2)

    assert caller.pongs == [41, 2**64 - 1]


async def test_an_empty_message_has_no_effect(served: Server) -> None:
    async with served.stream() as caller:
        await caller.send()
        await caller.open("hi")
        await caller.answers(1)

    assert caller.text[1] == "hi"


async def test_streams_that_violated_the_rules_do_not_keep_others_from_starting(served: Server) -> None:
    for _ in range(serving.MAX_STARTING + 1):
        async with served.stream() as caller:
            await caller.send(open=[opened(1, "wait"), opened(1, "wait")])
            assert isinstance(await caller.to_the_end(), errors.InvalidRequest)

    async with served.stream() as caller:
        await caller.open("hi")
        await caller.answers(1)
    assert caller.text[1] == "hi"


async def test_requests_without_an_event_yet_delay_others_for_a_moment_only(served: Server) -> None:
    async with served.stream() as slow, served.stream() as caller:
        await slow.send(open=[opened(n, "silent") for n in range(1, serving.MAX_STARTING + 1)])
        await caller.open("hi")
        await caller.answers(1)

        assert caller.text[1] == "hi"
        assert not slow.events


async def test_streams_that_are_lost_while_requests_start_do_not_keep_others_from_starting(
    served: Server,
) -> None:
    for turns in range(3 * serving.MAX_STARTING):
        async with served.stream() as caller:
            handles = range(1, 3 * serving.TURN)
            await caller.send(open=[opened(n, "fail") for n in handles])
            for _ in range(turns % 24):
                await asyncio.sleep(0)
            caller.call.cancel()

    async with served.stream() as caller, asyncio.timeout(PATIENCE):
        await caller.open("hi")
        await caller.answers(1)
    assert caller.text[1] == "hi"


async def test_the_log_names_the_caller_of_a_stream(served: Server, caplog: pytest.LogCaptureFixture) -> None:
    def logged() -> list[str]:
        return [record.message for record in caplog.records if vars(record).get("caller") == "gateway-7"]

    with caplog.at_level("INFO", logger="headrace.multiplex.serving"):
        async with served.stream(hello=False) as caller:
            await caller.send(hello=wire.MultiplexHello(caller_id="gateway-7"), open=[opened(1, "hi")])
            await caller.answers(1)
            assert logged() == ["shared stream opened"]
        await eventually(lambda: logged() == ["shared stream opened", "shared stream ended"])
