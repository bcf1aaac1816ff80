"""With --explore, a router sends requests without pins to tiers drawn at random, and counts them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from headrace.client import chat
from headrace.router.chooser import Chooser
from headrace.router.settings import Settings
from headrace.router.state.thresholds import Thresholds
from headrace.router.state.tiers import Tiers
from headrace.routing.changes.exploring import explore
from headrace.routing.drafts.check import load as load_check
from headrace.routing.policy import decide
from headrace.routing.request import Hints, RoutingRequest
from headrace.routing.tier_view import TierView
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


async def test_requests_that_chance_has_moved_count_for_the_tier_that_they_went_to() -> None:
    """The shares of --share are of actual calls, so the thresholds correct for chance."""
    thresholds = Thresholds([0.0, 0.5], shares=[0.5])
    tiers = Tiers([("small", ["127.0.0.1:1"]), ("large", ["127.0.0.1:2"])])
    chooser = Chooser(tiers, thresholds, load_check())
    views = [TierView("small", 0.0), TierView("large", 0.5)]
    moved = explore(decide(0.9, Hints(), views), 1.0, 0.0)
    for _ in range(20):
        chooser.record_decision(RoutingRequest(0.9, Hints()), moved)

    assert (moved.tier, moved.explored) == ("small", True)
    assert thresholds.now() == [0.0, 0.0], "all further calls go to the large tier"


async def test_explaining_a_request_shows_the_decision_without_chance() -> None:
    async with routed(
        {"explore": 1.0, "thresholds": "1"}, small=FakeBatcher(), large=FakeBatcher()
    ) as client:
        tiers = {(await client.explain(chat(EASY))).tier for _ in range(ASKED)}

    assert tiers == {"small"}


@pytest.mark.parametrize(("share", "explore"), [("0.3", 0.2), ("0.02", 0.04), ("", 1.0)])
def test_exploration_below_the_shares_of_the_tiers_is_possible(share: str, explore: float) -> None:
    assert Settings(tiers="a=127.0.0.1:1,b=127.0.0.1:2", share=share, explore=explore).explore == explore


@pytest.mark.parametrize("share", ["0.02", "0.98"])
def test_chance_alone_must_not_exceed_the_share_of_a_tier(share: str) -> None:
    with pytest.raises(ValueError, match="lower it"):
        Settings(tiers="a=127.0.0.1:1,b=127.0.0.1:2", share=share, explore=0.05)
