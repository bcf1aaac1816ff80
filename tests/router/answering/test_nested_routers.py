"""A router may be a tier of another router: names, bills and failover are those of the first one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from headrace import errors
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import Client, chat, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from tests.harness import collect, prompt, until_healthy
from tests.router.fake_batchers import FakeBatcher, routed, routing_port, serving_fake
from tests.router.rogue import read

PRICES = {"prices": "cheap=1/2,dear=10/20"}


async def test_the_routers_own_name_of_a_tier_applies() -> None:
    """With `--tiers cheap=...` in front of a batcher with `--tier small`."""
    cheap, dear = FakeBatcher(tier="small"), FakeBatcher(tier="huge")
    async with routed(PRICES, cheap=cheap, dear=dear) as client:
        request = chat("Hi!")
        request.routing.session_id = "s"
        request.routing.min_tier = request.routing.max_tier = request.routing.tier = "cheap"
        pinned = await collect(client, request)
        request.ClearField("routing")
        request.routing.session_id = "s"
        free = await collect(client, request)
        said = await client.feedback(free.accepted.request_id, ok=True)
        bill = (await client.list_tiers()).bill

    assert (pinned.accepted.tier, free.accepted.tier, said.tier) == ("cheap", "cheap", "cheap")
    assert [charge.tier for charge in pinned.finish.bill.charges] == ["cheap"]
    assert [(charge.tier, charge.answers) for charge in bill.charges] == [("cheap", 2)]
    asked = cheap.requests[0].routing
    assert (asked.tier, asked.min_tier, asked.max_tier, asked.session_id) == ("", "", "", "s")


async def test_a_draft_of_a_tier_with_another_name_of_its_own_is_escalated() -> None:
    settings = {"cascade": True, "cascade_min_quality": 1.0, "thresholds": "0.9", **PRICES}
    async with routed(settings, cheap=FakeBatcher(tier="dear"), dear=FakeBatcher(tier="cheap")) as client:
        answer = await collect(client, chat("Hi!"))

    assert answer.accepted.tier == "dear"
    charges = {charge.tier: (charge.answers, charge.wasted_tokens) for charge in answer.finish.bill.charges}
    assert charges == {"cheap": (0, 3), "dear": (1, 0)}


@asynccontextmanager
async def nested(
    settings: dict[str, Any], small: FakeBatcher, large: FakeBatcher, dear: FakeBatcher
) -> AsyncGenerator[Client, None]:
    """Start a router with the tiers cheap and dear; cheap is a router with the tiers small and large."""
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(routing_port(settings, small=small, large=large))
        outer = {"thresholds": "0.99", **PRICES}
        yield await stack.enter_async_context(routed(outer, cheap=f"127.0.0.1:{port}", dear=dear))


async def test_a_router_in_front_of_a_router_returns_one_bill() -> None:
    small, large, dear = FakeBatcher(model="s"), FakeBatcher(model="l"), FakeBatcher(model="d")
    inner = {
        "cascade": True,
        "cascade_min_quality": 1.0,
        "thresholds": "0.9",
        "prices": "small=5/5,large=6/6",
    }
    request = chat("Hi!")
    request.stream.include_route_changes = True
    request.stream.flush_tokens = 1
    async with nested(inner, small, large, dear) as client:
        events = await read(client, request)
        listed = await client.list_tiers()
        pinned = chat("Hi!")
        pinned.routing.model = "l"
        pinned.routing.tier = "cheap"
        by_model = await collect(client, pinned)
        pinned.routing.model = "x"
        with pytest.raises(errors.UnknownModel, match="the models are d, l, s"):
            await collect(client, pinned)

    kinds = [one.WhichOneof("event") for one in events]
    assert kinds == ["accepted", "route_change", "delta", "delta", "delta", "finish"]
    assert events[0].accepted.tier == "cheap"
    assert (getattr(events[1].route_change, "from"), events[1].route_change.to) == (
        "cheap/small",
        "cheap/large",
    )
    (charge,) = events[-1].finish.bill.charges
    assert (charge.tier, charge.completion_tokens, charge.wasted_tokens) == ("cheap", 3, 3)
    assert events[-1].finish.bill.cost == pytest.approx(6 * 2 / 1e6), "by the prices of the first router"
    assert (listed.tiers[0].model, listed.tiers[0].healthy) == ("s, l", True)
    assert by_model.accepted.model == "l"
    assert len(small.requests) == 1
    assert dear.requests == []


async def test_routers_that_name_each_other_forward_a_request_a_limited_number_of_times() -> None:
    """Each of them then uses its other tier."""
    fake = FakeBatcher()
    async with AsyncExitStack() as stack:
        first, second = stack.enter_context(reserved_ports(2))
        address = await stack.enter_async_context(serving_fake(fake))
        fast: dict[str, Any] = {
            "drain_seconds": 0,
            "poll_seconds": 0.05,
            "tier_wait_seconds": 0,
            "thresholds": "0.99",
        }
        for port, other in ((first, second), (second, first)):
            tiers = f"other=127.0.0.1:{other},own={address}"
            await stack.enter_async_context(router(Settings(port=port, tiers=tiers, **fast)))
        client = await stack.enter_async_context(connect(f"127.0.0.1:{first}", retries=0))
        await until_healthy(client, True, True)
        answer = await collect(client, prompt("abc"))

        only = prompt("abc")
        only.routing.allow_escalation = False
        with pytest.raises(errors.NoWorkers, match="name each other as tiers"):
            await collect(client, only)

    assert answer.text == "abc"
    assert len(fake.requests) == 1


async def test_an_answer_that_lost_a_router_behind_the_router_resumes_with_its_model() -> None:
    small, large, dear = (
        FakeBatcher(model="s", breaks=[1, 1, 1]),
        FakeBatcher(model="l"),
        FakeBatcher(model="d"),
    )
    async with nested({}, small, large, dear) as client:
        answer = await collect(client, prompt("all of it"))

    assert answer.text == "all of it"
    assert {request.routing.model for request in small.requests} == {"", "s"}
    assert large.requests == dear.requests == []
