"""A flusher decides when tokens are handed to the reader of a call on a shared stream."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from headrace import flushing
from headrace.flushing import Flusher
from headrace.multiplex.shared_call import SharedCall
from headrace.router.own_calls import OwnCalls
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE

ACCEPTED = pb.GenerateResponse(accepted=pb.Accepted(request_id="r"))
FINISH = pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_STOP))


class Unused:
    """A stream of which nothing is expected."""

    def cancel(self, handle: int) -> None:
        raise AssertionError

    def grant(self) -> None:
        raise AssertionError


def call(flusher: Flusher | None, request: pb.GenerateRequest | None = None) -> SharedCall:
    return SharedCall(Unused(), 1, request or pb.GenerateRequest(prompt="x"), None, (), flusher)


def delta(offset: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        delta=pb.Delta(offset=offset, token_count=1, token_ids=[offset], text=chr(97 + offset))
    )


async def taken(reader: SharedCall) -> list[str]:
    """Return the texts of the events that can be read without waiting; "-" for an event without text."""
    texts: list[str] = []
    while True:
        reading = asyncio.ensure_future(reader.next())
        await asyncio.sleep(0)
        if not reading.done():
            reading.cancel()
            return texts
        response = reading.result()
        if response is None:
            return texts
        texts.append(response.delta.text if response.HasField("delta") else "-")


async def test_the_first_token_is_handed_over_at_once_and_later_ones_in_groups() -> None:
    one = call(Flusher(tokens=3, seconds=PATIENCE))
    one.receive(ACCEPTED)
    one.receive(delta(0))
    assert await taken(one) == ["-", "a"]

    one.receive(delta(1))
    one.receive(delta(2))
    assert await taken(one) == []
    one.receive(delta(3))
    assert await taken(one) == ["bcd"]
    one.receive(delta(4))
    one.receive(FINISH)
    assert await taken(one) == ["e", "-"]


async def test_gathered_tokens_are_handed_over_in_time() -> None:
    one = call(Flusher(tokens=100, seconds=0.01))
    one.receive(delta(0))
    assert await taken(one) == ["a"]
    one.receive(delta(1))
    async with asyncio.timeout(PATIENCE):
        response = await one.next()

    assert response is not None
    assert response.delta.text == "b"


@pytest.mark.parametrize("ends", ["cancel", "fail", "lose"])
async def test_an_end_is_not_delayed_by_gathered_tokens(ends: str) -> None:
    class Stream(Unused):
        def cancel(self, handle: int) -> None:
            assert handle == 1

    one = SharedCall(
        Stream(), 1, pb.GenerateRequest(prompt="x"), None, (), Flusher(tokens=9, seconds=PATIENCE)
    )
    one.receive(delta(0))
    assert await taken(one) == ["a"]
    one.receive(delta(1))
    if ends == "cancel":
        one.cancel()
        assert await taken(one) == ["b"]
    else:
        getattr(one, ends)(RuntimeError("lost"))
        with pytest.raises(RuntimeError, match="lost"):
            while True:
                assert await one.next() is not None


async def test_tokens_are_gathered_for_many_calls_and_not_for_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    async def write(response: pb.GenerateResponse) -> None:
        pass

    monkeypatch.setattr(flushing, "UPDATE_SECONDS", 0.0)
    calls = OwnCalls()
    with ExitStack() as open_calls:
        writes = [open_calls.enter_context(calls.counted(write)) for _ in range(16)]
        await writes[0](delta(0))
        assert calls.flusher.tokens == 1
        writes += [open_calls.enter_context(calls.counted(write)) for _ in range(64)]
        assert calls.flusher.tokens == 8
    with calls.counted(write):
        assert calls.flusher.tokens == 1


async def test_a_delta_is_offered_while_the_reader_waits_and_nothing_is_before_it() -> None:
    """Otherwise it would overtake the events before it."""
    one, offered = call(None), list[str]()

    def take(response: pb.GenerateResponse) -> bool:
        offered.append(response.delta.text)
        return True

    one.offer(take)
    one.receive(ACCEPTED, alone=True)
    one.receive(delta(0), alone=True)
    assert await taken(one) == ["-", "a"]

    reading = asyncio.ensure_future(one.next())
    await asyncio.sleep(0)
    one.receive(delta(1), alone=True)
    one.receive(delta(2), alone=False)
    one.receive(delta(3), alone=True)

    response = await reading
    assert (offered, response and response.delta.text) == (["b"], "cd")


async def test_what_is_not_taken_is_read() -> None:
    one = call(None)
    one.offer(lambda response: False)
    reading = asyncio.ensure_future(one.next())
    await asyncio.sleep(0)

    one.receive(delta(0), alone=True)

    response = await reading
    assert response is not None
    assert response.delta.text == "a"


async def test_an_error_of_the_one_who_takes_ends_the_call_and_not_the_stream() -> None:
    class Cancelled(Unused):
        def cancel(self, handle: int) -> None:
            assert handle == 1

    one = SharedCall(Cancelled(), 1, pb.GenerateRequest(prompt="x"), None, (), None)

    def take(response: pb.GenerateResponse) -> bool:
        raise ZeroDivisionError

    one.offer(take)
    reading = asyncio.ensure_future(one.next())
    await asyncio.sleep(0)

    assert one.receive(delta(0), alone=True) is False
    with pytest.raises(ZeroDivisionError):
        await reading
