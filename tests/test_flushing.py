"""Gathered tokens are flushed in time, and requests without options of their own follow the load."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.inbox import Inbox
from headrace.flushing import (
    MAX_TOKENS_PER_EVENT,
    UPDATE_SECONDS,
    Flusher,
    LiveFlushing,
    framed_tokens,
    message_tokens,
)
from tests.harness import eventually


async def begun(flusher: Flusher, answers: int) -> list[Inbox]:
    """Return inboxes whose readers have read the first token."""
    inboxes = [Inbox(flusher) for _ in range(answers)]
    for inbox in inboxes:
        inbox.put([0], [])
        await inbox.take()
    return inboxes


async def test_answers_in_progress_follow_a_change_of_the_shared_flusher() -> None:
    flusher = Flusher(tokens=1, seconds=60)
    inboxes = await begun(flusher, 2)
    flusher.tokens = 2
    for inbox in inboxes:
        inbox.put([1], [])
    assert not any(inbox.ready for inbox in inboxes)
    flusher.tokens = 1
    for inbox in inboxes:
        inbox.put([2], [])

    assert [(await inbox.take()).ids for inbox in inboxes] == [[1, 2], [1, 2]]


async def test_one_timer_flushes_every_answer_that_gathers_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, timers = asyncio.get_running_loop(), list[float]()
    call_later = loop.call_later

    def counted(delay: float, *rest: Any) -> asyncio.TimerHandle:
        timers.append(delay)
        return call_later(delay, *rest)

    inboxes = await begun(Flusher(tokens=2, seconds=0.02), 50)
    monkeypatch.setattr(loop, "call_later", counted)
    for inbox in inboxes:
        inbox.put([1], [])
    inboxes[0].put([2], [])  # has enough
    assert (await inboxes[0].take()).ids == [1, 2]
    assert timers == [0.02]
    monkeypatch.undo()
    await eventually(lambda: all(inbox.ready for inbox in inboxes[1:]))

    assert not inboxes[0].ready
    assert [(await inbox.take()).ids for inbox in inboxes[1:]] == [[1]] * 49
    inboxes[0].put([3], [])  # after the timer: it gathers again
    await eventually(lambda: inboxes[0].ready)


def test_the_load_is_measured_at_intervals() -> None:
    live = LiveFlushing()
    assert live.is_due(0.0)
    live.update(0.0, streams=100, tokens_per_second=50_000.0)

    assert (live.messages.tokens, live.framed.tokens) == (32, 3)
    assert not live.is_due(UPDATE_SECONDS / 2)
    assert live.is_due(UPDATE_SECONDS)


def test_a_higher_token_rate_makes_larger_messages() -> None:
    sizes = [message_tokens(8, rate) for rate in (0, 900, 2_500, 12_000, 1e6)]

    assert sizes == [1, 1, 3, 12, 32]


def test_more_streams_make_larger_messages() -> None:
    sizes = [message_tokens(streams, 0.0) for streams in (1, 16, 17, 40, 100, 1000)]

    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 8)


@given(rate=st.floats(0, 1e7))
def test_framed_events_have_one_token_until_their_rate_is_the_load(rate: float) -> None:
    tokens = framed_tokens(rate)

    assert 1 <= tokens <= MAX_TOKENS_PER_EVENT
    assert tokens == MAX_TOKENS_PER_EVENT or rate / tokens <= 20_000 + 1e-6
    if rate <= 20_000:
        assert tokens == 1
