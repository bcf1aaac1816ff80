"""A candidate that is not worse is rarely rolled back, however often one looks; a worse one soon is."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.changes.verdict import FEW, MAX_TENANTS, STAKES, Bets, Evidence, Rule, judge, log_wealth

RULE = Rule(0.05)
SHARES = st.floats(0.01, 0.99)
OUTCOMES = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 1)), max_size=60)


def rolled_back_after(
    bad: tuple[float, float],
    *,
    seed: int,
    most: int,
    share: float = 0.2,
    tenants: int = 1,
    liar: dict[bool, float] | None = None,
) -> int | None:
    """The number of outcomes after which a candidate is rolled back; None if it is not.

    bad    probability of a bad outcome, of control and candidate
    liar   outcomes that one tenant reports, by whether they are the candidate's
    """
    drawn = random.Random(seed)
    evidence = Evidence(share)
    for count in range(1, most + 1):
        tenant, candidate = drawn.randrange(tenants), drawn.random() < share
        badness = float(drawn.random() < bad[candidate])
        if liar is not None and tenant == 0:
            badness = liar[candidate]
        evidence.add(str(tenant), candidate=candidate, badness=badness)
        if count % 5 == 0 and judge([evidence], RULE).worse:
            return count
    return None


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("bad", [0.3, 0.02])
def test_equal_arms_are_rolled_back_in_at_most_one_of_twenty_trials(share: float, bad: float) -> None:
    """At every fifth outcome somebody looks: a test for a fixed number of outcomes would fail here."""
    trials = 120
    rolled_back = sum(
        rolled_back_after((bad, bad), seed=seed, most=600, share=share) is not None for seed in range(trials)
    )

    assert rolled_back <= 0.05 * trials


def test_a_clearly_worse_candidate_is_rolled_back_soon() -> None:
    needed = sorted(rolled_back_after((0.2, 0.6), seed=seed, most=3000) or 9999 for seed in range(21))

    assert needed[10] < 400
    assert needed[-1] < 1500


def test_a_better_candidate_is_kept() -> None:
    assert not any(rolled_back_after((0.5, 0.2), seed=seed, most=1000) for seed in range(20))


def test_no_candidate_is_rolled_back_after_a_few_outcomes() -> None:
    evidence = Evidence(0.5)
    for place in range(2 * RULE.fewest - 2):
        evidence.add("", candidate=place % 2 == 1, badness=float(place % 2))
    before = judge([evidence], RULE)
    for place in range(2):
        evidence.add("", candidate=place % 2 == 1, badness=float(place % 2))

    assert before.p_value < 1e-6
    assert (before.worse, judge([evidence], RULE).worse) == (False, True)


def test_one_of_several_tenants_cannot_roll_a_candidate_back() -> None:
    """It reports that all answers of the candidate are bad, and all others good."""
    lies = {True: 1.0, False: 0.0}
    alone = rolled_back_after((0.3, 0.3), seed=1, most=1000, tenants=1, liar=lies)
    among = [rolled_back_after((0.3, 0.3), seed=seed, most=1500, tenants=8, liar=lies) for seed in range(20)]

    assert alone is not None
    assert sum(count is not None for count in among) <= 2


def test_one_of_several_tenants_cannot_keep_a_bad_candidate() -> None:
    lies = {True: 0.0, False: 1.0}
    counts = [rolled_back_after((0.2, 0.6), seed=seed, most=4000, tenants=8, liar=lies) for seed in range(10)]

    assert sum(count is not None for count in counts) >= 9


@given(share=SHARES, outcomes=OUTCOMES, badness=st.floats(0, 1))
def test_without_a_difference_no_stake_gains_on_average(
    share: float, outcomes: list[tuple[str, bool, float]], badness: float
) -> None:
    """The wealth is a martingale: its mean over the next assignment is what it was."""

    def wealth(*then: bool) -> list[float]:
        evidence = Evidence(share)
        for tenant, candidate, bad in [*outcomes, *(("a", arm, badness) for arm in then)]:
            evidence.add(tenant, candidate=candidate, badness=bad)
        bets = evidence.tenants.get("a", Bets())
        return [math.exp(value) for value in bets.log_wealth]

    for now, if_candidate, if_control in zip(wealth(), wealth(True), wealth(False), strict=True):
        assert share * if_candidate + (1 - share) * if_control == pytest.approx(now)


@given(share=SHARES, outcomes=OUTCOMES)
def test_the_evidence_of_processes_adds_up(share: float, outcomes: list[tuple[str, bool, float]]) -> None:
    parts = [Evidence(share), Evidence(share)]
    for place, (tenant, candidate, badness) in enumerate(outcomes):
        parts[place % 2].add(tenant, candidate=candidate, badness=badness)
    verdict = judge(parts, RULE)

    assert sum(verdict.counts) == len(outcomes)
    assert 0 < verdict.p_value <= 1
    assert judge(parts[::-1], RULE).counts == verdict.counts
    whole = {name: part.tenants[name] for part in parts for name in part.tenants}
    if not parts[1].tenants.keys() & parts[0].tenants.keys():
        assert verdict.p_value == pytest.approx(math.exp(-max(log_wealth(whole, RULE.needed), 0.0)))


@given(wealth=st.floats(0, 1e6), tenants=st.integers(2, 20))
def test_the_wealth_of_one_of_several_tenants_is_never_enough(wealth: float, tenants: int) -> None:
    others = {str(place): Bets(FEW) for place in range(tenants - 1)}
    needed = RULE.needed

    assert log_wealth({"one": Bets(FEW, 0.0, [wealth] * len(STAKES)), **others}, needed) < needed
    alone = log_wealth({"one": Bets(FEW, 0.0, [wealth] * len(STAKES))}, needed)
    assert alone == pytest.approx(wealth, abs=math.log(2))


@given(tenants=st.integers(4, 50))
def test_all_but_one_of_at_least_four_tenants_are_enough(tenants: int) -> None:
    """Whatever that one reports."""
    agreeing = {str(place): Bets(FEW, 0.0, [50.0] * len(STAKES)) for place in range(tenants - 1)}
    liar = Bets(FEW, 0.0, [-1e6] * len(STAKES))

    needed = Rule(0.02).needed
    assert log_wealth({**agreeing, "one": liar}, needed) >= needed


def test_the_evidence_is_bounded_for_any_number_of_tenants() -> None:
    evidence = Evidence(0.5)
    for place in range(10 * MAX_TENANTS):
        evidence.add(f"tenant {place}", candidate=bool(place % 2), badness=0.5)

    assert len(evidence.tenants) == MAX_TENANTS + 1
    assert sum(bets.outcomes for bets in evidence.tenants.values()) == 10 * MAX_TENANTS


def test_more_of_the_same_evidence_lowers_the_p_value() -> None:
    evidence, values = Evidence(0.5), []
    for place in range(200):
        evidence.add("", candidate=place % 2 == 1, badness=float(place % 2))
        values.append(judge([evidence], RULE).p_value)

    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(values[20::2]))
