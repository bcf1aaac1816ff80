"""Credit limits the events of one request, and a caller that does not read delays only its own stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from headrace.multiplex.outbox import MAX_UNSENT_BYTES
from headrace.runtime.serving.limits import Limits
from headrace.v1 import multiplex_pb2 as wire
from tests.harness import eventually
from tests.multiplex.raw import HELLO, NARROW, RawCaller, Server, opened, server

# What gRPC may take of an unread stream: the first messages, and what its buffers hold.
BUFFERED_BYTES = 1 << 20


@pytest.fixture(scope="module")
async def served() -> AsyncGenerator[Server, None]:
    async with server(Limits(max_calls=1 << 15, max_inflight_bytes=1 << 28)) as running:
        yield running


def credit(handle: int, events: int) -> wire.EventCredit:
    return wire.EventCredit(handle=handle, events=events)


async def pass_by(served: Server) -> None:
    """Have requests answered on another stream: until then the server has done what it can for others."""
    async with served.stream() as caller:
        for turn in range(20):
            await caller.open(*["abc"] * 50, first=1 + turn * 50)
            await caller.answers(*range(1 + turn * 50, 51 + turn * 50))
        assert not caller.ends


async def test_no_more_events_are_sent_than_granted(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("abcdef", credit=3)
        await caller.read_until(lambda: len(caller.events[1]) == 3)
        await caller.open("other", first=2)
        await caller.answers(2)
        await caller.send(ping=1)
        await caller.read_until(lambda: caller.pongs)

        assert caller.events[1] == ["accepted", "delta", "delta"]
        assert caller.text[2] == "other", "a request without credit does not delay another one"


async def test_more_credit_continues_the_answer(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("abcdef", credit=0)
        for events in range(1, 9):
            await caller.send(credit=[credit(1, events)])
            await caller.read_until(lambda events=events: len(caller.events[1]) == events)  # type: ignore[misc]

    assert caller.text[1] == "abcdef"
    assert caller.ended(1)


async def test_credit_is_a_total_that_never_shrinks(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("abcdef", credit=2)
        await caller.send(credit=[credit(1, 5), credit(1, 3), credit(1, 0)])
        await caller.read_until(lambda: len(caller.events[1]) == 5)
        await caller.send(credit=[credit(1, 5), credit(77, 5)], ping=1)
        await caller.read_until(lambda: caller.pongs)

        assert len(caller.events[1]) == 5


async def test_a_message_may_open_a_request_and_raise_its_credit(served: Server) -> None:
    async with served.stream(hello=False) as caller:
        await caller.send(hello=HELLO, open=[opened(1, "abc", credit=0)], credit=[credit(1, 9)])
        await caller.answers(1)

    assert caller.text[1] == "abc"


async def test_credit_that_was_granted_once_is_good_for_a_long_answer(served: Server) -> None:
    """A caller may grant more than the server ever sends ahead; it need not repeat itself."""
    text = "abcd" * 1000
    async with served.stream() as caller:
        await caller.open(text, text, credit=2**32 - 1)
        await caller.send(open=[opened(3, text, credit=1)], credit=[credit(3, 2**32 - 1)])
        await caller.answers(1, 2, 3)

    assert caller.text == {1: text, 2: text, 3: text}


async def test_an_error_needs_no_credit(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("fail", "wait", "abc", credit=0)
        await caller.send(cancel=[2])
        await caller.answers(1, 2)

        assert (caller.reason(1), caller.reason(2)) == ("NO_WORKERS", "CANCELLED")
        assert not caller.events[3]


async def test_a_request_without_credit_ends_at_its_deadline(served: Server) -> None:
    async with served.stream() as caller:
        await caller.open("abc", credit=1, ttl=0.05)
        await caller.answers(1)

    assert caller.events[1] == ["accepted", "error"]
    assert caller.reason(1) == "DEADLINE"


@pytest.mark.parametrize("granted", [None, 2**32 - 1])
async def test_a_caller_that_does_not_read_gets_little_ahead(served: Server, granted: int | None) -> None:
    """Neither its other requests nor more credit change how much the server keeps for it."""
    requests = 40
    before = served.echo.written
    async with served.stream(options=NARROW) as caller:
        await caller.open(*["fill"] * requests, **({} if granted is None else {"credit": granted}))
        await eventually(lambda: (served.echo.written - before) * 10_000 > MAX_UNSENT_BYTES / 2)
        between = served.echo.written
        await pass_by(served)
        others = 20 * 50 * 5  # events of `pass_by`

        assert (between - before) * 10_000 <= MAX_UNSENT_BYTES + BUFFERED_BYTES
        assert (served.echo.written - before - others) * 10_000 <= MAX_UNSENT_BYTES + BUFFERED_BYTES
        await caller.send(cancel=range(1, requests + 1))
        await eventually(lambda: not served.echo.running)
        await caller.answers(*range(1, requests + 1))


async def test_requests_of_an_unread_stream_end_at_their_deadlines(served: Server) -> None:
    async with served.stream(options=NARROW) as caller:
        await caller.open(*["fill"] * 40, ttl=0.3)
        await eventually(lambda: served.echo.running)
        await eventually(lambda: not served.echo.running)
        await caller.answers(*range(1, 41))

    assert {caller.reason(n) for n in range(1, 41)} == {"DEADLINE"}


async def test_a_caller_that_does_not_read_cannot_pile_up_errors(served: Server) -> None:
    """Requests that fail at once need neither credit nor a place among the calls in flight."""
    messages = 20
    before = len(served.echo.received)

    async def flood(caller: RawCaller) -> None:
        for turn in range(messages):
            await caller.open(*["fail"] * 256, first=1 + turn * 256)

    async with served.stream(options=NARROW) as caller:
        flooding = asyncio.create_task(flood(caller))
        await eventually(lambda: len(served.echo.received) - before > 512)
        await pass_by(served)
        taken = len(served.echo.received) - before - 20 * 50

        assert taken * 1000 <= MAX_UNSENT_BYTES + BUFFERED_BYTES
        assert taken < messages * 256
        await caller.answers(*range(1, messages * 256 + 1))
        await flooding
    assert {caller.reason(n) for n in range(1, messages * 256 + 1)} == {"NO_WORKERS"}
