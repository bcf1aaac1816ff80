"""With --explore, a router sends requests without pins to tiers drawn at random, and counts them."""

from __future__ import annotations

from collections.abc import Callable

from headrace.client import chat
from tests.harness import collect
from tests.router.drafts import EASY
from tests.router.fake_batchers import FakeBatcher, routed

ASKED = 60  # all of them are drawn, so one tier gets none with a probability of 2 ** -60


async def test_requests_without_pins_go_to_tiers_drawn_at_random(count: Callable[..., float]) -> None:
    before = count("headrace.routed", tier="large", route="explored")
    small, large = FakeBatcher(), FakeBatcher()
    async with routed({"explore": 1.0, "thresholds": "1"}, small=small, large=large) as client:
        for _ in range(ASKED):
            await collect(client, chat(EASY))

    assert small.requests
    assert large.requests
    assert count("headrace.routed", tier="large", route="explored") - before == len(large.requests)


async def test_pins_bounds_and_health_hold_with_exploration() -> None:
    small, medium, large = FakeBatcher(), FakeBatcher(), FakeBatcher(healthy=False)
    settings = {"explore": 1.0, "thresholds": "0,1"}
    async with routed(settings, small=small, medium=medium, large=large) as client:
        for _ in range(ASKED // 2):
            pinned, bounded, certain = chat(EASY), chat(EASY), chat(EASY)
            pinned.routing.tier = "medium"
            bounded.routing.min_tier = "medium"
            certain.routing.quality_preference = 1
            for request in (pinned, bounded, certain):
                assert (await collect(client, request)).accepted.tier == "medium"

    assert not small.requests
    assert not large.requests


async def test_explaining_a_request_shows_the_decision_without_chance() -> None:
    async with routed(
        {"explore": 1.0, "thresholds": "1"}, small=FakeBatcher(), large=FakeBatcher()
    ) as client:
        tiers = {(await client.explain(chat(EASY))).tier for _ in range(ASKED)}

    assert tiers == {"small"}
