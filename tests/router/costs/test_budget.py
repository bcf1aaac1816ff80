"""A budget per day is kept, whatever the traffic, and a restart brings neither credit nor debt."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.router.costs.budget import DAY, Budget
from headrace.routing.success.choosing import Weighed

START = 20_000 * DAY  # midnight
CHEAP, DEAR = 0.1, 1.0


def spend_day(budget: Budget, moments: list[float], start: float = START) -> float:
    """Return what requests at these parts of a day cost, if each is decided under the budget."""
    spent = 0.0
    for moment in moments:
        now = start + moment * DAY
        # The dearer tier is worth it at a weight below 0.2 / 0.9.
        weighed = Weighed((0.5, 0.7), (CHEAP, DEAR), 0.2 * budget.factor(now))
        cost = (CHEAP, DEAR)[weighed.best((0, 1))]
        budget.spend(cost, now)
        spent += cost
    return spent


@pytest.mark.parametrize("part", [0.2, 0.4, 0.7])
def test_even_traffic_spends_the_budget_and_no_more(part: float) -> None:
    moments = [place / 4000 for place in range(4000)]
    per_day = part * DEAR * len(moments)

    spent = spend_day(Budget(per_day, START), moments)

    assert spent == pytest.approx(per_day, rel=0.02)


def test_a_day_is_planned_like_the_day_before() -> None:
    """Otherwise a service that is used in the morning alone could use only half of its budget."""
    morning = [1 / 6 + place / 12_000 for place in range(4000)]
    per_day = 0.4 * DEAR * len(morning)
    budget = Budget(per_day, START)

    first, second = (spend_day(budget, morning, START + day * DAY) for day in range(2))

    assert first < 0.8 * per_day
    assert 0.9 * per_day < second <= 1.02 * per_day


@given(moments=st.lists(st.floats(0, 0.999), min_size=1, max_size=300), part=st.floats(0.05, 2))
def test_more_than_the_budget_is_spent_only_on_the_cheapest_tier(moments: list[float], part: float) -> None:
    moments = sorted(moments)
    per_day = part * DEAR * len(moments)

    spent = spend_day(Budget(per_day, START), moments)

    assert spent <= max(per_day + DEAR, 0.0) + CHEAP * len(moments)
    assert spent >= CHEAP * len(moments) * (1 - 1e-9)


def test_a_budget_that_is_not_needed_lets_quality_decide() -> None:
    budget = Budget(1000.0, START)

    assert budget.factor(START) == 1.0
    assert budget.factor(START + 0.5 * DAY) == 0.0


def test_a_restart_brings_neither_credit_nor_debt() -> None:
    noon = START + DAY / 2

    assert Budget(10.0, noon).factor(noon) == pytest.approx(1.0)


def test_a_new_day_begins_with_the_debt_of_the_last_and_without_its_credit() -> None:
    thrifty, lavish = Budget(10.0, START), Budget(10.0, START)
    lavish.spend(10.1, START + 0.9 * DAY)

    assert thrifty.factor(START + DAY) == 1.0
    assert lavish.factor(START + 0.95 * DAY) == math.inf
    assert 1 < lavish.factor(START + DAY) < math.inf
    assert lavish.factor(START + 3 * DAY) == 1.0, "a debt is forgotten after a day without requests"


def test_requests_that_have_not_ended_count_with_what_they_will_probably_cost() -> None:
    """A thousand requests that arrive together are not all sent to the dearer tier."""
    budget, chosen = Budget(100.0, START), []
    for _ in range(1000):
        weighed = Weighed((0.5, 0.7), (CHEAP, DEAR), 0.2 * budget.factor(START + DAY / 2))
        chosen.append(weighed.cost[weighed.best((0, 1))])
        budget.expect(chosen[-1], START + DAY / 2)
    for cost in chosen:
        budget.expect(-cost, START + DAY / 2)
        budget.spend(cost, START + DAY / 2)

    assert sum(chosen) <= 100 + DEAR + CHEAP * len(chosen)
    assert sum(cost == DEAR for cost in chosen) > 10


def test_a_clock_that_is_set_back_brings_neither_credit_nor_debt() -> None:
    budget = Budget(10.0, START)
    budget.spend(5.0, START + DAY / 2)

    assert budget.factor(START - DAY / 4) == pytest.approx(1.0)
    midnight = Budget(10.0, START)
    assert midnight.factor(START - 0.001) == pytest.approx(1.0)
    assert midnight.factor(START) == pytest.approx(1.0)


@given(
    steps=st.lists(st.tuples(st.floats(-2 * DAY, 2 * DAY), st.floats(0, 100)), max_size=30),
    per_day=st.floats(0.01, 100),
)
def test_the_factor_is_a_number_for_any_clock(steps: list[tuple[float, float]], per_day: float) -> None:
    now = START
    budget = Budget(per_day, now)
    for change, cost in steps:
        now += change
        budget.spend(cost, now)

        assert budget.factor(now) >= 0
