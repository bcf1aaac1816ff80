"""An inbox delivers the first token immediately, and later ones as its flusher says."""

from __future__ import annotations

import asyncio

import pytest

from headrace import errors
from headrace.batcher.inbox import Inbox, SequenceEnd
from headrace.flushing import Flusher
from headrace.v1 import generation_pb2 as pb

END = SequenceEnd(pb.FINISH_REASON_STOP, pb.Usage(), pb.Timing())


async def test_the_first_token_is_delivered_immediately_and_later_ones_together() -> None:
    inbox = Inbox(Flusher(tokens=3, seconds=60))
    inbox.put([1], [])
    assert (await inbox.take()).ids == [1]

    waiting = asyncio.create_task(inbox.take())
    inbox.put([2], [])
    inbox.put([3], [])
    await asyncio.sleep(0)
    assert not waiting.done()
    inbox.put([4], [])

    assert (await waiting).ids == [2, 3, 4]


async def test_a_token_waits_no_longer_than_the_flush_interval() -> None:
    inbox = Inbox(Flusher(tokens=1000, seconds=0.01))
    inbox.put([1], [])
    await inbox.take()
    inbox.put([2], [])

    assert (await asyncio.wait_for(inbox.take(), 5)).ids == [2]


async def test_the_end_is_delivered_with_the_gathered_tokens() -> None:
    inbox = Inbox(Flusher(tokens=1000, seconds=60))
    inbox.put([1], [])
    await inbox.take()
    inbox.put([2, 3], [-0.5, -1.0])
    inbox.end(END)

    arrival = await inbox.take()

    assert (arrival.ids, arrival.scores, arrival.end) == ([2, 3], [-0.5, -1.0], END)


async def test_tokens_from_before_a_failure_are_delivered_before_it() -> None:
    inbox = Inbox(Flusher())
    inbox.put([1], [])
    inbox.fail(errors.WorkerLost("gone"))

    assert (await inbox.take()).ids == [1]
    with pytest.raises(errors.WorkerLost):
        await inbox.take()


async def test_a_reader_that_was_cancelled_misses_nothing() -> None:
    inbox = Inbox(Flusher())
    reading = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.put([1], [])
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading

    assert (await inbox.take()).ids == [1]


async def test_tokens_are_offered_while_the_reader_waits_and_nothing_is_before_them() -> None:
    """Otherwise they would overtake the tokens before them."""
    inbox, offered = Inbox(Flusher()), list[list[int]]()

    def take(ids: list[int], scores: object) -> bool:
        offered.append(ids)
        return True

    inbox.offer(take)
    assert not inbox.pass_on([1], [])
    inbox.put([1], [])
    await inbox.take()
    assert not inbox.pass_on([2], [])

    reading = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    assert inbox.pass_on([2], [])
    inbox.put([3], [])
    assert not inbox.pass_on([4], [])

    assert (offered, (await reading).ids) == ([[2]], [3])


async def test_tokens_that_wait_for_more_are_not_offered() -> None:
    inbox = Inbox(Flusher(tokens=2, seconds=60))
    inbox.offer(lambda ids, scores: True)
    inbox.put([1], [])
    await inbox.take()
    reading = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)

    assert not inbox.pass_on([2], [])
    reading.cancel()


async def test_an_error_of_the_one_who_takes_fails_the_answer() -> None:
    inbox = Inbox(Flusher())

    def take(ids: list[int], scores: object) -> bool:
        raise ZeroDivisionError

    inbox.offer(take)
    inbox.put([1], [])
    await inbox.take()
    reading = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)

    assert inbox.pass_on([2], [])
    with pytest.raises(ZeroDivisionError):
        await reading
