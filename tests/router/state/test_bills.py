"""A bill is complete, adds up, and never overstates the cost on the largest tier."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import chat
from headrace.router.settings import Settings
from headrace.router.state.bills import Bill
from headrace.routing.tier_view import Price
from tests.harness import collect
from tests.router.drafts import EASY
from tests.router.fake_batchers import FakeBatcher, routed

TIERS = ("small", "medium", "large")
TOKENS = st.integers(0, 10_000)
AMOUNTS = st.floats(0, 100)
PRICES = st.builds(Price, AMOUNTS, AMOUNTS, st.none() | AMOUNTS)


@dataclass(frozen=True)
class Work:
    """The work of a tier: prompt tokens, cached tokens, and generated tokens."""

    tier: str
    prompt: int
    cached: int
    said: int


@st.composite
def works(draw: st.DrawFn, tier: str | None = None) -> Work:
    prompt = draw(TOKENS)
    return Work(tier or draw(st.sampled_from(TIERS)), prompt, draw(st.integers(0, prompt)), draw(TOKENS))


@dataclass(frozen=True)
class Request:
    """A request with its discarded drafts, and its answer if it has one."""

    drafts: list[Work]
    answer: Work | None

    def bill(self, prices: dict[str, Price]) -> Bill:
        bill = Bill(TIERS, prices)
        for draft in self.drafts:
            bill.add_attempt(draft.tier)
            bill.add_draft(
                draft.tier, prompt_tokens=draft.prompt, cached_tokens=draft.cached, tokens=draft.said
            )
        if (answer := self.answer) is not None:
            bill.add_attempt(answer.tier)
            bill.add_answer(
                answer.tier, prompt_tokens=answer.prompt, cached_tokens=answer.cached, tokens=answer.said
            )
        return bill


REQUESTS = st.builds(Request, st.lists(works(), max_size=2), st.none() | works())
ALL_PRICED = st.fixed_dictionaries(dict.fromkeys(TIERS, PRICES))


def total(requests: list[Request], prices: dict[str, Price]) -> Bill:
    bill = Bill(TIERS, prices)
    for request in requests:
        bill.add(request.bill(prices))
    return bill


@given(requests=st.lists(REQUESTS, max_size=8), prices=ALL_PRICED)
def test_every_token_is_on_the_bill_and_the_sum_is_that_of_the_requests(
    requests: list[Request], prices: dict[str, Price]
) -> None:
    bill = total(requests, prices)
    every = [work for request in requests for work in (*request.drafts, request.answer) if work is not None]
    charges = [charge for _, charge in bill.charges]

    assert sum(charge.prompt_tokens for charge in charges) == sum(work.prompt for work in every)
    assert sum(charge.cached_tokens for charge in charges) == sum(work.cached for work in every)
    assert sum(charge.completion_tokens + charge.wasted_tokens for charge in charges) == sum(
        work.said for work in every
    )
    assert sum(charge.attempts for charge in charges) == len(every)
    assert bill.cost == pytest.approx(sum(request.bill(prices).cost or 0 for request in requests))
    assert bill.largest_tier_cost == pytest.approx(
        sum(request.bill(prices).largest_tier_cost or 0 for request in requests)
    )


@given(requests=st.lists(REQUESTS, max_size=8), prices=ALL_PRICED)
def test_without_a_price_for_cached_tokens_they_cost_as_much_as_others(
    requests: list[Request], prices: dict[str, Price]
) -> None:
    without = {tier: Price(price.prompt, price.completion) for tier, price in prices.items()}
    alike = {
        tier: Price(price.prompt, price.completion, cached_prompt=price.prompt)
        for tier, price in prices.items()
    }

    assert total(requests, without).cost == pytest.approx(total(requests, alike).cost)
    assert total(requests, without).largest_tier_cost == pytest.approx(
        total(requests, alike).largest_tier_cost
    )


@given(requests=st.lists(REQUESTS, max_size=8), prices=ALL_PRICED)
def test_a_lower_price_for_cached_tokens_never_increases_a_cost(
    requests: list[Request], prices: dict[str, Price]
) -> None:
    full = {tier: Price(price.prompt, price.completion) for tier, price in prices.items()}
    lower = {
        tier: Price(price.prompt, price.completion, min(price.cached_prompt or 0.0, price.prompt))
        for tier, price in prices.items()
    }
    before, after = total(requests, full), total(requests, lower)

    assert 0 <= (after.cost or 0) <= (before.cost or 0) + 1e-9
    assert 0 <= (after.largest_tier_cost or 0) <= (before.largest_tier_cost or 0) + 1e-9


@given(answers=st.lists(works("large"), min_size=1, max_size=8), prices=ALL_PRICED)
def test_what_the_largest_tier_answered_alone_saves_and_loses_nothing(
    answers: list[Work], prices: dict[str, Price]
) -> None:
    bill = total([Request([], answer) for answer in answers], prices)

    assert bill.cost == pytest.approx(bill.largest_tier_cost)


@given(answers=st.lists(works(), max_size=8), prices=ALL_PRICED)
def test_with_one_price_for_all_tiers_routing_saves_nothing(
    answers: list[Work], prices: dict[str, Price]
) -> None:
    same = dict.fromkeys(TIERS, prices["large"])
    bill = total([Request([], answer) for answer in answers], same)

    assert (bill.cost or 0) == pytest.approx(bill.largest_tier_cost or 0)


@given(request=REQUESTS, prices=ALL_PRICED)
def test_drafts_with_more_cached_tokens_make_the_largest_tier_cheaper_and_never_negative(
    request: Request, prices: dict[str, Price]
) -> None:
    large = prices["large"]
    prices = {**prices, "large": Price(large.prompt, large.completion, min(large.prompt, 1.0))}
    cold = Request(
        [Work(draft.tier, draft.prompt, 0, draft.said) for draft in request.drafts], request.answer
    )
    most = max((work.cached for work in (*request.drafts, request.answer) if work), default=0)
    found = request.bill(prices).largest_tier_cost or 0.0

    assert 0 <= found <= (cold.bill(prices).largest_tier_cost or 0.0) + 1e-9
    if request.answer is not None and request.answer.cached == most:
        assert found == pytest.approx(cold.bill(prices).largest_tier_cost), (
            "the answer had as many cached tokens"
        )


def test_prices_are_two_or_three_numbers() -> None:
    def priced(prices: str) -> dict[str, Price]:
        return Settings(tiers="small=a:1,large=b:1", prices=prices).tier_prices()

    assert priced("small=1/2,large=3/4/0.5") == {"small": Price(1, 2), "large": Price(3, 4, 0.5)}
    for wrong in ("small=1", "small=1/2/3/4", "small=1/2/x"):
        with pytest.raises(ValueError, match=r"is not NAME=PROMPT/COMPLETION\[/CACHED_PROMPT\]"):
            priced(wrong)
    for wrong in ("small=1/2/-1", "huge=1/2", "small=1/2/inf"):
        with pytest.raises(ValueError, match="must name one of the tiers small, large and prices"):
            priced(wrong)


async def test_prices_and_bills_are_listed() -> None:
    settings = {"prices": "small=1/2,large=10/20"}
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
        for _ in range(3):
            await collect(client, chat(EASY))
        listed = await client.list_tiers()

    assert (listed.tiers[1].price.prompt, listed.tiers[1].price.completion) == (10, 20)
    (charge,) = listed.bill.charges
    assert (charge.tier, charge.answers, charge.completion_tokens) == ("small", 3, 3 * len(EASY))
    assert listed.bill.cost == pytest.approx(3 * len(EASY) * 2 / 1e6)
    assert listed.bill.largest_tier_cost == pytest.approx(3 * len(EASY) * 20 / 1e6)
