"""The router in front of batchers that refuse: which tier is tried next, and which error is returned."""

from __future__ import annotations

import pytest

from headrace import errors
from headrace.client import chat
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect
from tests.router.fake_batchers import FakeBatcher, routed


async def test_a_tier_that_refuses_the_request_is_replaced_by_another() -> None:
    small, large = FakeBatcher(refuses="broken"), FakeBatcher()
    async with routed(small=small, large=large) as client:
        answer = await collect(client, chat("Hi!"))

    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert (len(small.requests), len(large.requests)) == (1, 1)
    assert small.requests[0].sampling.seed == large.requests[0].sampling.seed, "one request, one seed"
    assert small.requests[0].request_id == large.requests[0].request_id


async def test_without_escalation_the_caller_gets_the_error_of_the_tier() -> None:
    small, large = FakeBatcher(refuses="broken"), FakeBatcher()
    async with routed(small=small, large=large) as client:
        request = chat("Hi!")
        request.routing.allow_escalation = False
        with pytest.raises(errors.NoWorkers, match="'small' cannot be reached") as caught:
            await collect(client, request)

    assert caught.value.retry_after == 1.0
    assert large.requests == []


async def test_if_every_tier_refuses_the_error_names_the_last_one() -> None:
    async with routed(small=FakeBatcher(refuses="broken"), large=FakeBatcher(refuses="broken")) as client:
        with pytest.raises(errors.NoWorkers, match="'large' cannot be reached"):
            await collect(client, chat("Hi!"))


async def test_a_request_waits_for_a_tier_that_was_healthy_recently() -> None:
    """As in a rolling restart: the last batcher drains before the router has polled the first new one."""
    only = FakeBatcher(refuses=errors.Draining("going"), refusals=3)
    async with routed({"tier_wait_seconds": 60, "poll_seconds": 0.05}, only=only) as client:
        answer = await collect(client, chat("Hi!"))

    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert len({request.request_id for request in only.requests}) == 1


async def test_a_request_does_not_wait_for_a_full_tier() -> None:
    only = FakeBatcher(refuses=errors.Overloaded("full", retry_after=1.0))
    async with routed({"tier_wait_seconds": 60}, only=only) as client:
        with pytest.raises(errors.Overloaded):
            await collect(client, chat("Hi!"))

    assert len(only.requests) == 1


async def test_a_request_does_not_wait_for_a_tier_that_was_never_healthy() -> None:
    request = chat("Hi!")
    request.routing.tier = "small"
    async with routed(
        {"tier_wait_seconds": 600}, small=FakeBatcher(healthy=False), large=FakeBatcher()
    ) as client:
        with pytest.raises(errors.NoWorkers, match="small"):
            await collect(client, request)


async def test_a_prompt_that_is_too_long_for_one_tier_goes_to_another() -> None:
    small = FakeBatcher(refuses=errors.ContextTooLong("5,000 tokens do not fit 4,096", field="input"))
    large = FakeBatcher()
    async with routed(small=small, large=large) as client:
        answer = await collect(client, chat("Hi!"))
        request = chat("Hi!")
        request.routing.tier = "small"
        with pytest.raises(errors.ContextTooLong):
            await collect(client, request)

    assert answer.accepted.tier == "large"
    assert len(large.requests) == 1


async def test_a_full_tier_is_reported_before_a_tier_with_too_short_a_context() -> None:
    short = errors.ContextTooLong("5,000 tokens do not fit 4,096", field="input")
    full = errors.Overloaded("full", retry_after=1.0)
    for first, second in ((short, full), (full, short)):
        async with routed(small=FakeBatcher(refuses=first), large=FakeBatcher(refuses=second)) as client:
            with pytest.raises(errors.Overloaded):
                await collect(client, chat("Hi!"))
