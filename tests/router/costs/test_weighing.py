"""Expected costs follow prices, lengths and caches, and the processes of a router share a budget."""

from __future__ import annotations

import math

import pytest

from headrace.router.costs.usage import TierUsage
from headrace.router.costs.weighing import Weighing
from headrace.router.siblings import Siblings, inboxes
from headrace.routing.request import Hints, RoutingRequest
from headrace.routing.success.choosing import Weighed
from headrace.routing.success.estimate import Estimate
from headrace.routing.tier_view import Price
from headrace.v1 import generation_pb2 as pb
from tests.harness import eventually

PRICES = {"small": Price(1.0, 2.0, 0.1), "large": Price(10.0, 20.0)}


def asked(
    tokens: float | None = None, preference: float = 0.5, max_tokens: int | None = None
) -> RoutingRequest:
    return RoutingRequest(
        score=0.5,
        hints=Hints(quality_preference=preference),
        estimates={"small": Estimate(0.4, tokens), "large": Estimate(0.8, tokens)},
        prompt_bytes=4000,
        max_tokens=max_tokens,
    )


def weighed(weighing: Weighing, request: RoutingRequest, reached: str = "") -> Weighed:
    found = weighing.weigh(request, reached)
    assert found is not None
    return found


def test_the_expected_cost_is_that_of_the_expected_tokens() -> None:
    weighing = Weighing(["small", "large"], PRICES)

    found = weighed(weighing, asked(tokens=100))

    assert found.good == (0.4, 0.8)
    assert found.cost == pytest.approx([(1000 * 1 + 100 * 2) / 1e6, (1000 * 10 + 100 * 20) / 1e6])
    short = weighed(weighing, asked(tokens=100, max_tokens=10))
    assert short.cost[1] == pytest.approx((1000 * 10 + 10 * 20) / 1e6)


def test_the_typical_cost_of_the_dearest_tier_is_worth_the_configured_chance() -> None:
    found = weighed(Weighing(["small", "large"], PRICES, cost_weight=0.15), asked())

    typical = TierUsage().typical_cost(PRICES["large"])
    assert found.weight * typical == pytest.approx(0.15)
    assert weighed(Weighing(["small", "large"], PRICES), asked(preference=0)).weight == math.inf
    assert weighed(Weighing(["small", "large"], PRICES), asked(preference=1)).weight == 0


def test_recent_answers_replace_what_was_assumed() -> None:
    weighing = Weighing(["small", "large"], PRICES)
    for _ in range(200):
        usage = pb.Usage(prompt_tokens=2000, completion_tokens=50)
        weighing.record(asked(), "large", usage, follows=False)

    found = weighed(weighing, asked())

    assert found.cost[1] == pytest.approx((2000 * 10 + 50 * 20) / 1e6, rel=0.05)
    assert found.cost[0] == pytest.approx((1000 * 1 + 200 * 2) / 1e6), "other tiers have other tokenizers"


def test_a_conversation_is_cheaper_where_its_beginning_is_cached() -> None:
    weighing = Weighing(["small", "large"], PRICES)
    for follows in (True, False):
        for _ in range(300):
            usage = pb.Usage(prompt_tokens=1000, cached_tokens=900 if follows else 0, completion_tokens=100)
            weighing.record(asked(), "small", usage, follows=follows)

    here = weighed(weighing, asked(tokens=100), reached="small").cost[0]
    elsewhere = weighed(weighing, asked(tokens=100), reached="large").cost[0]

    assert here == pytest.approx((100 * 1 + 900 * 0.1 + 100 * 2) / 1e6, rel=0.05)
    assert elsewhere == pytest.approx((1000 * 1 + 100 * 2) / 1e6, rel=0.05)


def test_the_first_turns_that_follow_count_more_however_many_others_there_were() -> None:
    weighing = Weighing(["small", "large"], PRICES)
    for follows, count in ((False, 1000), (True, 10)):
        for _ in range(count):
            usage = pb.Usage(prompt_tokens=1000, cached_tokens=1000 * follows, completion_tokens=0)
            weighing.record(asked(), "small", usage, follows=follows)

    found = weighed(weighing, asked(tokens=0), reached="small")

    assert found.cost[0] < 0.2 * weighed(weighing, asked(tokens=0)).cost[0]
    assert (found.previous, weighed(weighing, asked()).previous) == (0, -1)


def test_without_estimates_of_every_tier_there_is_nothing_to_weigh() -> None:
    request = RoutingRequest(score=0.5, hints=Hints(), estimates={"small": Estimate(0.4)})

    assert Weighing(["small", "large"], PRICES).weigh(request, "") is None


def test_without_prices_a_tier_costs_ten_times_as_much_as_the_one_before() -> None:
    found = weighed(Weighing(["small", "large"], {}), asked())

    assert found.cost[1] == pytest.approx(10 * found.cost[0])


async def test_all_processes_of_a_router_spend_one_budget() -> None:
    mail = inboxes(2)
    first, second = Siblings(0, mail), Siblings(1, mail)
    spender, other = (
        Weighing(["small", "large"], PRICES, per_day=1.0, siblings=each, clock=lambda: 86_400.0)
        for each in (first, second)
    )
    before = weighed(other, asked()).weight
    try:
        async with first.listening(), second.listening():
            spender.spend(0.05)
            await eventually(lambda: weighed(other, asked()).weight > before)
    finally:
        for pair in mail:
            for end in pair:
                end.close()

    assert weighed(other, asked()).weight == weighed(spender, asked()).weight


def test_answers_without_usage_change_nothing() -> None:
    weighing = Weighing(["small", "large"], PRICES)
    before = weighed(weighing, asked())
    weighing.record(asked(), "small", pb.Usage(), follows=False)

    assert weighed(weighing, asked()) == before


def test_spending_beyond_the_plan_makes_cost_count_more() -> None:
    now = 1000.0 * 86_400
    weighing = Weighing(["small", "large"], PRICES, per_day=1.0, clock=lambda: now)
    before = weighed(weighing, asked()).weight
    weighing.spend(0.05)
    after = weighed(weighing, asked()).weight
    weighing.spend(1.0)

    assert before < after < math.inf
    assert weighed(weighing, asked()).weight == math.inf
    assert weighed(weighing, asked(preference=1)).weight == 0, "quality alone is a demand"
