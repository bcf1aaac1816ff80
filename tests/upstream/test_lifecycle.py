"""Requests end as those of a batcher do: cancelled, late, drained, unread, on calls and on shared streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from headrace import errors
from headrace.client import Client, connect
from headrace.v1 import generation_pb2 as pb
from tests.harness import eventually
from tests.upstream.fake import DONE, Exchange, delta, fake_upstream, finish, says, usage
from tests.upstream.tier import UpstreamTier, answer_of, ask, running_upstream


async def _begins(exchange: Exchange) -> None:
    """Send a first token, and the rest when the test allows it or the client has left."""
    await exchange.head()
    await exchange.chunk(delta("Hel"))
    await exchange.released_or_gone()
    await exchange.chunk(delta("lo") + finish() + usage(7, 2) + DONE)
    await exchange.chunk(b"")


async def _silent(exchange: Exchange) -> None:
    await exchange.until_gone()


async def _endless(exchange: Exchange) -> None:
    await exchange.head()
    while not exchange.gone:
        await exchange.chunk(delta("x" * 1000))


@asynccontextmanager
async def client_of(tier: UpstreamTier, *, shared: bool) -> AsyncGenerator[Client, None]:
    """Connect another client, whose requests share a stream or do not."""
    async with connect(f"127.0.0.1:{tier.running.server.port}", retries=0, multiplex=shared) as client:
        yield client


async def _read(client: Client, request: pb.GenerateRequest | None = None, timeout: float = 60) -> str:
    """Return the text of one answer."""
    responses = client.attempt(request or ask(), timeout=timeout)
    return "".join([response.delta.text async for response in responses])


_both_ways = pytest.mark.parametrize("shared", [False, True], ids=["call", "shared stream"])


@_both_ways
@pytest.mark.parametrize("stage", ["before", "within"])
async def test_a_caller_who_leaves_closes_the_connection_to_the_upstream(shared: bool, stage: str) -> None:
    async with (
        fake_upstream() as fake,
        running_upstream(fake) as tier,
        client_of(tier, shared=shared) as client,
    ):
        fake.usual = _silent if stage == "before" else _begins
        async with asyncio.TaskGroup() as tasks:

            async def leave() -> None:
                async with aclosing(client.attempt(ask(), timeout=600)) as responses:
                    async for response in responses:
                        if response.delta.text:
                            return

            caller = tasks.create_task(leave())
            await eventually(lambda: fake.most_answering == 1)  # it may have ended already
            if stage == "before":
                caller.cancel()

        await fake.idle()
        await eventually(lambda: not tier.left_behind)


@_both_ways
async def test_a_deadline_before_the_first_token_has_its_reason(shared: bool) -> None:
    async with (
        fake_upstream() as fake,
        running_upstream(fake, retries=3) as tier,
        client_of(tier, shared=shared) as client,
    ):
        fake.usual = _silent
        with pytest.raises(errors.DeadlineInQueue, match="before the first token"):
            await _read(client, timeout=0.5)

        await fake.idle()
        assert len(fake.seen) == 1


@_both_ways
async def test_a_deadline_within_an_answer_has_its_reason(shared: bool) -> None:
    async with (
        fake_upstream() as fake,
        running_upstream(fake) as tier,
        client_of(tier, shared=shared) as client,
    ):
        fake.usual = _begins
        text = ""
        with pytest.raises(errors.DeadlineInDecode):
            async for response in client.attempt(ask(), timeout=0.7):
                text += response.delta.text

        assert text == "Hel"
        await fake.idle()


async def test_the_deadline_holds_while_a_request_waits_for_a_slot() -> None:
    async with fake_upstream() as fake, running_upstream(fake, max_concurrent=1) as tier:
        fake.usual = _begins
        first = asyncio.create_task(answer_of(tier, ask()))
        await eventually(lambda: fake.answering == 1)

        with pytest.raises(errors.DeadlineInQueue):
            await answer_of(tier, ask(), timeout=0.4)

        assert tier.running.slots.queued == 0
        fake.released.set()
        assert (await first).text == "Hello"


@_both_ways
async def test_a_caller_who_does_not_read_stops_the_upstream_and_then_fails(shared: bool) -> None:
    """The connections hold what was not read, and nothing else does."""
    async with (
        fake_upstream() as fake,
        running_upstream(fake, max_unread_seconds=0.5) as tier,
        client_of(tier, shared=shared) as client,
    ):
        fake.usual = _endless
        with pytest.raises(errors.SlowReader):
            async with aclosing(client.attempt(ask(max_tokens=1000), timeout=600)) as responses:
                async for response in responses:
                    if response.delta.text:
                        await fake.idle()  # the service has closed the connection

        await eventually(lambda: not tier.left_behind)


async def test_a_drain_lets_answers_end_and_rejects_further_requests() -> None:
    async with fake_upstream() as fake:
        fake.usual = _begins
        async with running_upstream(fake, drain_seconds=60) as tier:
            answering = asyncio.create_task(answer_of(tier, ask()))
            await eventually(lambda: fake.answering == 1)
            requests = tier.running.server.requests
            requests.drain()  # as `serving` does when it is left
            with pytest.raises(errors.Draining):
                await answer_of(tier, ask())
            fake.released.set()

            assert (await answering).text == "Hello"


async def test_a_drain_that_takes_too_long_ends_answers_and_closes_their_connections() -> None:
    async with fake_upstream() as fake, AsyncExitStack() as later:
        fake.usual = _begins
        async with running_upstream(fake, drain_seconds=0.1) as tier:
            client = await later.enter_async_context(client_of(tier, shared=False))
            answering = asyncio.create_task(_read(client))
            await eventually(lambda: fake.answering == 1)

        with pytest.raises(errors.Draining):
            await answering
        await fake.idle()


@_both_ways
async def test_sixty_four_answers_are_streamed_at_the_same_time(shared: bool) -> None:
    async with (
        fake_upstream() as fake,
        running_upstream(fake, max_concurrent=64) as tier,
        client_of(tier, shared=shared) as client,
    ):
        fake.usual = _begins

        async with asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(_read(client, ask(f"{number}"))) for number in range(64)]
            await eventually(lambda: fake.answering == 64)
            fake.released.set()

        assert {task.result() for task in answers} == {"Hello"}
        assert {seen.json["messages"][0]["content"] for seen in fake.seen} == set(map(str, range(64)))
        await eventually(lambda: not tier.left_behind)


async def test_requests_beyond_the_slots_wait_and_those_beyond_the_queue_fail() -> None:
    async with fake_upstream() as fake, running_upstream(fake, max_concurrent=2, queue_limit=3) as tier:
        fake.usual = _begins
        answers = [asyncio.create_task(answer_of(tier, ask(str(number)))) for number in range(5)]
        await eventually(lambda: (tier.running.slots.taken, tier.running.slots.queued) == (2, 3))
        with pytest.raises(errors.Overloaded, match="3 wait") as raised:
            await answer_of(tier, ask())
        (listed,) = (await tier.client.list_tiers()).tiers
        fake.released.set()

        assert {(await answer).text for answer in answers} == {"Hello"}
        assert raised.value.retry_after is not None
        assert (listed.load.running, listed.load.queued) == (2, 3)
        assert (listed.limits.max_running, listed.limits.queue_limit) == (2, 3)
        assert fake.most_answering == 2


async def test_a_slot_is_free_again_whatever_ended_its_request() -> None:
    async with fake_upstream() as fake, running_upstream(fake, max_concurrent=1) as tier:
        for script, timeout in ((_silent, 0.2), (says(delta("x")), 60), (says(DONE), 60)):
            fake.usual = script
            with pytest.raises(errors.HeadraceError):
                await answer_of(tier, ask(), timeout=timeout)

        fake.released.set()
        fake.usual = _begins
        assert (await answer_of(tier, ask())).text == "Hello"


async def test_the_requests_of_a_minute_are_limited_with_the_time_to_wait(
    count: Callable[..., float],
) -> None:
    before = count("headrace.requests.refused", tier="large", error="QUEUE_FULL")
    async with fake_upstream() as fake, running_upstream(fake, requests_per_minute=2) as tier:
        for _ in range(2):
            await answer_of(tier, ask())
        with pytest.raises(errors.Overloaded, match="requests per minute") as raised:
            await answer_of(tier, ask())

        assert raised.value.retry_after == pytest.approx(30, abs=5)
        assert len(fake.seen) == 2
        assert count("headrace.requests.refused", tier="large", error="QUEUE_FULL") == before + 1


async def test_tokens_that_were_not_used_are_given_back() -> None:
    async with fake_upstream() as fake, running_upstream(fake, tokens_per_minute=1100) as tier:
        for _ in range(5):  # each may have 1024 tokens, and uses 10
            await answer_of(tier, ask())
        fake.usual = says(delta("x"), finish(), usage(600, 450), DONE)
        await answer_of(tier, ask())
        with pytest.raises(errors.Overloaded, match="tokens per minute"):
            await answer_of(tier, ask())

        assert len(fake.seen) == 6


async def test_a_long_request_is_translated_without_blocking_others() -> None:
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        answer = await answer_of(tier, ask("word " * 300_000))

        assert answer.text == "Hello you"
        assert len(fake.seen[0].body) > 1_500_000


async def test_times_of_an_answer_are_those_that_passed() -> None:
    async with fake_upstream() as fake, running_upstream(fake) as tier:
        began = time.monotonic()
        timing = (await answer_of(tier, ask())).finish.timing
        passed = (time.monotonic() - began) * 1e9

        first, total = timing.first_token.ToNanoseconds(), timing.total.ToNanoseconds()
        assert 0 < first <= total <= passed
        assert timing.queue.ToNanoseconds() <= first
        assert timing.decode.ToNanoseconds() <= total - first
