"""A router with limits per tenant, in front of a fake batcher: what callers over a limit receive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from headrace import errors, statuses
from headrace.client import Client, chat, connect
from headrace.metrics.catalogue import QUOTA_REFUSALS
from headrace.router.settings import Settings
from headrace.runtime.serving.server import StartFailed
from headrace.v1 import generation_pb2 as pb
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from tests.harness import PATIENCE, collect
from tests.router.fake_batchers import FakeBatcher, routed, routing_port

HELLO = "hello there"


def ask(tenant: str = "acme", text: str = HELLO, **sampling: Any) -> pb.GenerateRequest:
    request = chat(text)
    request.routing.tenant = tenant
    request.sampling.MergeFrom(pb.Sampling(**sampling))
    return request


@asynccontextmanager
async def limited(
    folder: Path, quotas: str, fake: FakeBatcher | None = None, **settings: Any
) -> AsyncGenerator[Client, None]:
    """Run a router with these limits; yield a client that does not retry."""
    path = folder / "quotas.toml"
    path.write_text(quotas)
    async with routed({"quotas": path, **settings}, only=fake or FakeBatcher()) as client:
        yield client


async def refused(client: Client, request: pb.GenerateRequest) -> errors.TenantQuota:
    with pytest.raises(errors.TenantQuota) as caught:
        await collect(client, request)
    return caught.value


async def test_a_tenant_over_its_requests_is_refused_and_others_are_not(tmp_path: Path) -> None:
    async with limited(tmp_path, "[default]\nrequests_per_minute = 3") as client:
        for _ in range(3):
            await collect(client, ask())
        error = await refused(client, ask())
        await collect(client, ask("other"))
        await collect(client, ask(""))

    assert error.fields == {"subject": "tenant:acme", "limit": "requests_per_minute", "value": "3"}
    assert error.retry_after is not None
    assert 0 < error.retry_after <= 20
    assert "tenant 'acme' reached the limit of 3 requests per minute" in error.message


async def test_tools_and_calls_count_as_text_of_the_prompt(tmp_path: Path) -> None:
    long = "x" * 4000  # some 1000 tokens
    with_tool, with_call = ask(max_tokens=10), ask(max_tokens=10)
    with_tool.chat.tools.add(name="f", description=long)
    with_call.chat.messages.add(role="assistant").tool_calls.add(
        id="1", name="f", arguments=f'{{"x": "{long}"}}'
    )
    with_call.chat.messages.add(role="user", content="go on")
    for first, refuses in ((ask(max_tokens=10), False), (with_tool, True), (with_call, True)):
        fake = FakeBatcher(hangs=True)
        async with (
            limited(tmp_path, "[default]\ntokens_per_minute = 500", fake) as client,
            aclosing(client.generate(first, timeout=PATIENCE)) as running,
        ):
            await anext(running)
            if refuses:
                error = await refused(client, ask(max_tokens=10))
                assert error.fields["limit"] == "tokens_per_minute"
            else:
                async with aclosing(client.generate(ask(max_tokens=10), timeout=PATIENCE)) as other:
                    assert (await anext(other)).HasField("accepted")


async def test_metrics_name_the_class_whose_limits_apply(tmp_path: Path, count: Callable[..., float]) -> None:
    gold = {"tenant_class": "gold"}
    quotas = '[classes.gold]\nrequests_per_minute = 1\n[tenants.acme]\nclass = "gold"'
    before = count("headrace.requests.refused", error="TENANT_QUOTA", **gold)
    async with limited(tmp_path, quotas) as client:
        await collect(client, ask())
        await refused(client, ask())

    assert count("headrace.requests.refused", error="TENANT_QUOTA", **gold) == before + 1
    assert count("headrace.tenant.requests", tenant="acme", outcome="ok", **gold) == 1


async def test_the_status_has_the_details_that_any_client_can_read(tmp_path: Path) -> None:
    path = tmp_path / "quotas.toml"
    path.write_text("[default]\nrequests_per_minute = 0")
    async with (
        routing_port({"quotas": path}, only=FakeBatcher()) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in GenerationServiceStub(channel).Generate(ask(), timeout=PATIENCE):
                pass

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailer = dict(caught.value.trailing_metadata() or ())[statuses.DETAILS_KEY]
    assert isinstance(trailer, bytes)
    details = status_pb2.Status.FromString(trailer).details
    failure = error_details_pb2.QuotaFailure()
    assert any(detail.Unpack(failure) for detail in details)
    assert failure.violations[0].subject == "tenant:acme"
    assert not any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details), "it never will"


async def test_explain_counts_as_a_request_and_needs_no_tokens(tmp_path: Path) -> None:
    quotas = "[default]\nrequests_per_minute = 2\ntokens_per_minute = 1"
    async with limited(tmp_path, quotas) as client:
        await client.explain(ask())
        await collect(client, ask())
        with pytest.raises(errors.TenantQuota):
            await client.explain(ask())


async def test_tokens_are_reserved_and_what_was_not_used_is_given_back(tmp_path: Path) -> None:
    """The answer has 11 tokens and the fake batcher reports none for the prompt."""
    async with limited(tmp_path, "[default]\ntokens_per_minute = 600") as client:
        for _ in range(20):  # each reserves more than 100
            await collect(client, ask(max_tokens=100))
        await collect(client, ask("bulk", "y" * 1000))
        error = await refused(client, ask("bulk", max_tokens=1))

    assert error.fields["limit"] == "tokens_per_minute"
    assert error.retry_after is not None
    assert error.retry_after > 30, "the answer of 1000 tokens has left a debt of 400"


@pytest.mark.parametrize("limit", ["tokens_per_minute = 1000", "cost_per_day = 0.5"])
async def test_the_prompt_of_a_text_alone_counts_for_callers_that_leave_early(
    tmp_path: Path, limit: str
) -> None:
    """Its service reports the tokens of the prompt at the end only."""
    fake = FakeBatcher(text_only=True, breaks=[1] * 9)
    prompt = "x" * 2400  # some 600 tokens
    async with limited(tmp_path, f"[default]\n{limit}", fake, prices="only=500/0") as client:
        with pytest.raises(errors.UpstreamLost):
            await collect(client, ask(text=prompt, max_tokens=1))
        error = await refused(client, ask(text=prompt, max_tokens=1))

    assert error.fields["limit"] == limit.split(" ")[0]
    assert len(fake.requests) == 1


async def test_streams_count_until_they_end_however_they_end(tmp_path: Path) -> None:
    fake = FakeBatcher(hangs=True)
    async with limited(tmp_path, "[default]\nconcurrent_streams = 2", fake) as client:
        async with AsyncExitStack() as stack:
            for _ in range(2):
                stream = await stack.enter_async_context(aclosing(client.generate(ask(), timeout=PATIENCE)))
                await anext(stream)
            error = await refused(client, ask())
            assert error.fields["limit"] == "concurrent_streams"
        fake.hangs = False
        async with asyncio.timeout(PATIENCE):
            for _ in range(5):  # one after the other
                while True:
                    try:
                        await collect(client, ask())
                        break
                    except errors.TenantQuota:  # the router has not noticed that the callers left
                        await asyncio.sleep(0.01)
        fake.refuses = errors.ContextTooLong("too long")
        for _ in range(5):
            with pytest.raises(errors.ContextTooLong):
                await collect(client, ask())


async def test_cost_is_what_the_bill_says_and_is_refused_until_the_day_ends(tmp_path: Path) -> None:
    quotas = "[default]\ncost_per_day = 1.0"
    # 11 tokens of 0.03 each.
    async with limited(tmp_path, quotas, prices="only=0/30000") as client:
        for _ in range(3):
            await collect(client, ask(max_tokens=11))
        error = await refused(client, ask(max_tokens=11))
        await collect(client, ask("other", max_tokens=100))

    assert error.fields["limit"] == "cost_per_day"
    assert error.retry_after is not None
    assert error.retry_after <= 86_400


async def test_a_priority_above_the_ceiling_is_lowered(tmp_path: Path) -> None:
    fake = FakeBatcher()
    async with limited(tmp_path, "[default]\nmax_priority = 3", fake) as client:
        for priority in (9, None, 2):
            request = ask()
            if priority is not None:
                request.routing.priority = priority
            await collect(client, request)

    assert [request.routing.priority for request in fake.requests] == [3, 3, 2]


async def test_shadow_mode_counts_and_admits(tmp_path: Path, count: Callable[..., float]) -> None:
    fake, quotas = FakeBatcher(), "[default]\nrequests_per_minute = 1\nmax_priority = 3"
    before = count(QUOTA_REFUSALS.name)
    async with limited(tmp_path, quotas, fake, quotas_shadow=True) as client:
        for _ in range(4):
            await collect(client, ask())

    assert count(QUOTA_REFUSALS.name) - before == 3
    assert not any(request.routing.priority for request in fake.requests), "nothing is lowered"


async def test_limits_that_change_apply_to_requests_that_follow(tmp_path: Path) -> None:
    quotas = "[default]\nrequests_per_minute = 1"
    async with limited(tmp_path, quotas, poll_seconds=0.05) as client:
        await collect(client, ask())
        await refused(client, ask())
        (tmp_path / "quotas.toml").write_text("[tenants.acme]\nconcurrent_streams = 5")
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await collect(client, ask())
                    break
                except errors.TenantQuota:
                    await asyncio.sleep(0.02)
        for _ in range(5):
            await collect(client, ask())


async def test_requests_on_a_shared_stream_count_like_others(tmp_path: Path) -> None:
    path = tmp_path / "quotas.toml"
    path.write_text("[default]\nrequests_per_minute = 2")
    async with (
        routing_port({"quotas": path}, only=FakeBatcher()) as port,
        connect(f"127.0.0.1:{port}", retries=0, multiplex=True) as client,
    ):
        await collect(client, ask())
        await collect(client, ask())
        error = await refused(client, ask())

    assert error.fields["subject"] == "tenant:acme"


async def test_a_router_does_not_start_with_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="requests_per_minute"):
        async with limited(tmp_path, "[default]\nrequests_per_minute = -1"):
            pass


def test_settings_of_quotas_need_the_file() -> None:
    with pytest.raises(ValueError, match="need HEADRACE_QUOTAS"):
        Settings(tiers="a=127.0.0.1:1", quota_peers="127.0.0.1:2")
    with pytest.raises(ValueError, match="HEADRACE_QUOTA_PEERS"):
        Settings(tiers="a=127.0.0.1:1", quotas=Path("q.toml"), quota_peers="nonsense")
