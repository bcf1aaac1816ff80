"""Behind a router, an upstream is a tier like others: chosen, escalated to, fallen back from and billed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from headrace import errors
from headrace.batcher.__main__ import batcher
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.client import Client, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings as RouterSettings
from headrace.v1 import tokenizer_service_pb2 as tokens
from tests.harness import collect, echo_engine, eventually, running_worker
from tests.upstream.fake import DONE, MODEL, Exchange, Fake, delta, fake_upstream, refuses, says
from tests.upstream.tier import UpstreamTier, ask, running_upstream


@dataclass(frozen=True)
class Mesh:
    """A router with a tier of its own, `small`, and one outside, `large`, that may have several upstreams."""

    client: Client
    fakes: Sequence[Fake]
    upstreams: Sequence[UpstreamTier]


@asynccontextmanager
async def mesh(upstreams: int = 1, **router_settings: Any) -> AsyncGenerator[Mesh, None]:
    """Run a router, an echo tier, and upstreams, each with a fake of its own."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        fakes = [await enter(fake_upstream()) for _ in range(upstreams)]
        tiers = [await enter(running_upstream(fake)) for fake in fakes]
        worker = await enter(running_worker(echo_engine()))
        settings = BatcherSettings(
            port=0, tier="small", workers=f"127.0.0.1:{worker.server.port}", fake=True, drain_seconds=2
        )
        small = await enter(batcher(settings, ByteTokenizer(), "small"))
        large = "+".join(f"127.0.0.1:{tier.running.server.port}" for tier in tiers)
        running = await enter(
            router(
                RouterSettings(
                    port=0,
                    tiers=f"small=127.0.0.1:{small.server.port},large={large}",
                    **{"drain_seconds": 2.0, "poll_seconds": 0.1, **router_settings},
                )
            )
        )
        client = await enter(connect(f"127.0.0.1:{running.port}", retries=0))

        async def healthy() -> bool:
            return all(tier.healthy for tier in (await client.list_tiers()).tiers)

        await eventually(lambda: running.health.ready and small.server.health.ready)
        while not await healthy():
            await asyncio.sleep(0.02)
        yield Mesh(client, fakes, tiers)


def pinned(tier: str = "large") -> Any:
    """Return a chat for a tier."""
    request = ask()
    request.routing.tier = tier
    request.stream.include_token_ids = True
    return request


async def test_a_tier_outside_answers_and_is_billed_by_the_usage_it_reports() -> None:
    async with mesh(prices="small=0/0,large=1/10") as running:
        answer = await collect(running.client, pinned())

        assert answer.text == "Hello you"
        assert (answer.accepted.tier, answer.accepted.model) == ("large", MODEL)
        assert answer.accepted.text_only
        (charge,) = answer.finish.bill.charges
        assert (charge.tier, charge.prompt_tokens, charge.completion_tokens) == ("large", 7, 3)
        assert answer.finish.bill.cost == pytest.approx((7 * 1 + 3 * 10) / 1e6)


async def test_a_tier_outside_that_fails_before_its_first_token_is_replaced_by_another() -> None:
    async with mesh() as running:
        running.fakes[0].usual = refuses(500)
        request = ask()
        request.routing.quality_preference = 1.0
        answers = [await collect(running.client, request) for _ in range(3)]

        assert {answer.accepted.tier for answer in answers} == {"small"}


async def test_a_pinned_tier_outside_that_is_busy_reports_the_delay() -> None:
    async with mesh() as running:
        running.fakes[0].usual = refuses(429, retry_after="30")

        with pytest.raises(errors.Overloaded) as raised:
            await collect(running.client, pinned())

        assert raised.value.retry_after is not None
        assert raised.value.retry_after > 20


async def test_an_answer_that_breaks_off_is_not_continued_elsewhere() -> None:
    async with mesh(upstreams=2) as running:
        for fake in running.fakes:
            fake.usual = says(delta("Hel"), DONE)
        text = ""

        with pytest.raises(errors.UpstreamLost):
            async for response in running.client.generate(pinned(), timeout=60):
                text += response.delta.text

        assert text == "Hel"
        assert sum(len(fake.seen) for fake in running.fakes) == 1


async def test_another_upstream_of_the_tier_takes_over_before_the_first_token() -> None:
    async with mesh(upstreams=2) as running:
        running.fakes[0].usual = refuses(500)
        for _ in range(4):
            assert (await collect(running.client, pinned())).text == "Hello you"


async def test_a_feature_that_only_the_own_tier_has_leads_there() -> None:
    async with mesh() as running:
        request = ask(top_k=5)
        request.routing.quality_preference = 1.0

        answer = await collect(running.client, request)

        assert answer.accepted.tier == "small"
        assert not running.fakes[0].seen


async def test_a_caller_who_leaves_the_router_closes_the_connection_to_the_upstream() -> None:
    async with mesh() as running:
        (fake,) = running.fakes

        async def stalls(exchange: Exchange) -> None:
            await exchange.head()
            await exchange.chunk(delta("Hel"))
            await exchange.until_gone()

        fake.usual = stalls
        caller = asyncio.create_task(collect(running.client, pinned()))
        await eventually(lambda: fake.answering == 1)
        caller.cancel()
        await asyncio.wait([caller])

        await fake.idle()
        await eventually(lambda: not running.upstreams[0].left_behind)


async def test_an_upstream_that_cannot_be_reached_is_the_reason_of_the_tier() -> None:
    async with mesh() as running:
        running.fakes[0].die()

        async def reason() -> str:
            return (await running.client.list_tiers()).tiers[1].unhealthy_reason

        while not await reason():
            await asyncio.sleep(0.02)

        assert running.fakes[0].url in await reason()


async def test_tokenizers_of_other_tiers_work_and_that_of_a_tier_outside_is_unimplemented() -> None:
    async with mesh() as running:

        def asked(tier: str) -> tokens.CountTokensRequest:
            return tokens.CountTokensRequest(prompt="hi", tokenizer=tokens.TokenizerChoice(tier=tier))

        assert (await running.client.count_tokens(asked("small"))).tokens == 2
        with pytest.raises(errors.Unimplemented, match="no tokenizer"):
            await running.client.count_tokens(asked("large"))
