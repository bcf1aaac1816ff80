"""The router in front of batchers that fail: what it hides, and what it says when it cannot."""

from __future__ import annotations

import pytest

from headrace import errors
from headrace.client import chat
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect
from tests.router.fake_batchers import Front, routed


async def test_a_tier_that_refuses_before_accepting_is_replaced_unseen() -> None:
    small, large = Front(refuses="broken"), Front()
    async with routed(small=small, large=large) as client:
        answer = await collect(client, chat("Hi!"))

    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert (len(small.requests), len(large.requests)) == (1, 1)
    assert small.requests[0].sampling.seed == large.requests[0].sampling.seed, "one request, one seed"
    assert small.requests[0].request_id == large.requests[0].request_id


async def test_without_leave_to_move_the_caller_hears_that_nobody_serves() -> None:
    small, large = Front(refuses="broken"), Front()
    async with routed(small=small, large=large) as client:
        request = chat("Hi!")
        request.routing.allow_escalation = False
        with pytest.raises(errors.NoWorkers, match="'small' cannot be reached") as caught:
            await collect(client, request)

    assert caught.value.retry_after == 1.0
    assert large.requests == []


async def test_when_every_tier_refuses_the_last_one_is_named() -> None:
    async with routed(small=Front(refuses="broken"), large=Front(refuses="broken")) as client:
        with pytest.raises(errors.NoWorkers, match="'large' cannot be reached"):
            await collect(client, chat("Hi!"))


async def test_a_tier_that_was_there_a_moment_ago_is_waited_for() -> None:
    """As in a rolling restart: the last batcher drains before the router has seen that the first is back."""
    only = Front(refuses=errors.Draining("going"), refusals=3)
    async with routed({"wait_seconds": 60, "poll_seconds": 0.05}, only=only) as client:
        answer = await collect(client, chat("Hi!"))

    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert len({request.request_id for request in only.requests}) == 1


async def test_a_tier_that_is_full_is_not_waited_for() -> None:
    only = Front(refuses=errors.Overloaded("full", retry_after=1.0))
    async with routed({"wait_seconds": 60}, only=only) as client:
        with pytest.raises(errors.Overloaded):
            await collect(client, chat("Hi!"))

    assert len(only.requests) == 1


async def test_a_tier_that_was_never_there_is_not_waited_for() -> None:
    request = chat("Hi!")
    request.routing.tier = "small"
    async with routed({"wait_seconds": 600}, small=Front(healthy=False), large=Front()) as client:
        with pytest.raises(errors.NoWorkers, match="small"):
            await collect(client, request)


async def test_a_prompt_too_long_for_one_tier_goes_to_another() -> None:
    small = Front(refuses=errors.ContextTooLong("5,000 tokens do not fit 4,096", field="input"))
    large = Front()
    async with routed(small=small, large=large) as client:
        answer = await collect(client, chat("Hi!"))
        request = chat("Hi!")
        request.routing.tier = "small"
        with pytest.raises(errors.ContextTooLong):
            await collect(client, request)

    assert answer.accepted.tier == "large"
    assert len(large.requests) == 1


async def test_that_a_tier_is_full_is_better_advice_than_that_another_ones_context_is_short() -> None:
    short = errors.ContextTooLong("5,000 tokens do not fit 4,096", field="input")
    full = errors.Overloaded("full", retry_after=1.0)
    for first, second in ((short, full), (full, short)):
        async with routed(small=Front(refuses=first), large=Front(refuses=second)) as client:
            with pytest.raises(errors.Overloaded):
                await collect(client, chat("Hi!"))
