"""Processes that lease from one keeper never admit more than the limits, whatever messages are lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace import errors
from headrace.router.quotas.accounts import OTHERS, Account, Accounts, Calendar
from headrace.router.quotas.amounts import Amounts
from headrace.router.quotas.holder import Holder
from headrace.router.quotas.keeper import MAX_MEMBERS, MEMBER_SECONDS, Ask, Keeper
from headrace.router.quotas.limits import Limits

KEY = ("acme", "default")
LIMITS = Limits(requests_per_minute=20, tokens_per_minute=200, concurrent_streams=7, cost_per_day=50.0)
NEED = Amounts(1.0, 10.0, 1.0, 1)


def calendar() -> Calendar:
    """Return a calendar whose first day begins at 0 on the clock of these tests."""
    made = Calendar()
    made.sync(0.0)
    return made


class Process:
    """One process that leases; the test carries its messages."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.holder = Holder()
        self.account: Account = Accounts(lambda tenant, quota: LIMITS).get(KEY, 0.0, 0)
        self.asked: list[tuple[Account, Ask]] = []  # in flight
        self.granted: list[Amounts] = []  # on the way back

    def start(self) -> bool:
        if self.holder.take(self.account, NEED):
            self.account.used.add(NEED)
            self.account.streams += 1
            return True
        self.holder.follow(self.account)
        return False

    def end(self, tokens: float) -> None:
        """End a stream that has used another number of tokens than was estimated."""
        correction = Amounts(tokens=tokens - NEED.tokens)
        self.account.used.add(correction)
        self.account.streams -= 1
        self.holder.charge(self.account, correction)
        self.holder.free(self.account, 1)

    def asks(self, waiting: int, now: float) -> list[tuple[Account, Ask]]:
        must = Amounts(NEED.requests * waiting, NEED.tokens * waiting, NEED.cost * waiting, waiting)
        return self.holder.asks({KEY: (self.account, must)} if waiting else {}, now)


MOVES = st.tuples(
    st.integers(0, 2),  # process; 0 is the keeper itself
    st.sampled_from(["start", "end", "ask", "arrive", "answer", "lost"]),
    st.sampled_from([0, 1, 7]),  # requests that start, end or wait
)


# The second report gives a slice back, which is used while the report is in flight.
GIVEN_BACK = [
    *((1, move, 7) for move in ("ask", "arrive", "answer")),
    *((1, move, 0) for move in ("ask", "arrive")),
    (0, "start", 7),
    (1, "start", 7),
]


@settings(max_examples=200)
@example(GIVEN_BACK)
@given(st.lists(MOVES, max_size=150))
def test_together_they_never_admit_more_than_the_limits(moves: Sequence[tuple[int, str, int]]) -> None:
    accounts = Accounts(lambda tenant, quota: LIMITS)
    keeper = Keeper(accounts, calendar())
    own = accounts.get(KEY, 0.0, 0)
    processes = [Process(number) for number in range(1, 3)]
    admitted = 0
    for place, move, count in moves:
        if place == 0:
            for _ in range(count):
                if move == "start" and keeper.take(own, NEED, 0.0) is None:
                    own.streams += 1
                    admitted += 1
                elif move == "end" and own.streams:
                    own.streams -= 1
        else:
            process = processes[place - 1]
            if move == "start":
                admitted += sum(process.start() for _ in range(count))
            elif move == "end":
                for _ in range(min(count, process.account.streams)):
                    process.end(NEED.tokens)
            elif move == "ask":  # a report before it may have been lost, or was not answered in time
                process.asked, process.granted = process.asks(count, 0.0), []
            elif move == "arrive" and process.asked and not process.granted:
                asks = [ask for _, ask in process.asked]
                process.granted = keeper.lease(process.incarnation, asks, 0.0)
            elif move == "answer" and process.granted:
                for (account, ask), amounts in zip(process.asked, process.granted, strict=True):
                    process.holder.grant(account, ask, amounts)
                process.asked, process.granted = [], []
            elif move == "lost":
                process.asked, process.granted = [], []
        streams = own.streams + sum(process.account.streams for process in processes)
        assert streams <= LIMITS.concurrent_streams
        assert admitted <= LIMITS.requests_per_minute, "no time passes, so nothing refills"
        assert own.requests >= 0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 10)), max_size=60))
def test_a_budget_that_is_asked_for_is_used_up(asked: Sequence[tuple[int, int]]) -> None:
    """Slices do not keep from one process what another one does not use."""
    accounts = Accounts(lambda tenant, quota: Limits(requests_per_minute=50))
    keeper = Keeper(accounts, calendar())
    processes = [Process(number) for number in range(1, 4)]
    admitted = 0
    for place, waiting in [*asked, *[(number % 3, 10) for number in range(40)]]:
        process = processes[place]
        asks = process.asks(waiting, 0.0)
        for (account, ask), amounts in zip(
            asks, keeper.lease(process.incarnation, [ask for _, ask in asks], 0.0), strict=True
        ):
            process.holder.grant(account, ask, amounts)
        for _ in range(waiting):
            if started := process.start():
                process.end(NEED.tokens)
            admitted += started

    assert admitted == 50


def test_a_keeper_gives_out_its_share_while_processes_are_missing() -> None:
    accounts = Accounts(lambda tenant, quota: LIMITS)
    keeper = Keeper(accounts, calendar())
    keeper.know(4, 0.0)
    account = accounts.get(KEY, 0.0, 0)

    admitted = sum(keeper.take(account, Amounts(1.0), 0.0) is None for _ in range(100))
    keeper.lease(1, [], 0.0)
    with_another = keeper.share
    keeper.tick(MEMBER_SECONDS + 0.1)

    assert admitted == LIMITS.requests_per_minute / 4
    assert with_another == 0.5
    assert keeper.share == 0.25
    assert keeper.take(account, Amounts(1.0), 60.0) is None


def test_streams_of_a_process_that_is_lost_are_free_for_others() -> None:
    accounts = Accounts(lambda tenant, quota: LIMITS)
    keeper = Keeper(accounts, calendar())
    process = Process(1)
    asks = process.asks(7, 0.0)
    granted = keeper.lease(1, [ask for _, ask in asks], 0.0)
    account = accounts.get(KEY, 0.0, 0)

    assert granted[0].streams == 7
    assert (refusal := keeper.take(account, NEED, 0.0)) is not None
    assert refusal.limit == "concurrent_streams"
    keeper.tick(MEMBER_SECONDS + 0.1)
    assert keeper.take(account, NEED, 0.0) is None


def test_cost_starts_anew_each_day_and_requests_refill_within_a_minute() -> None:
    accounts = Accounts(lambda tenant, quota: Limits(requests_per_minute=60, cost_per_day=10))
    keeper = Keeper(accounts, calendar())
    account = accounts.get(KEY, 0.0, 0)

    assert keeper.take(account, Amounts(1.0, cost=10.0), 0.0) is None
    assert (refusal := keeper.take(account, Amounts(1.0, cost=1.0), 3600.0)) is not None
    assert (refusal.limit, refusal.retry_after) == ("cost_per_day", 86_400 - 3600)
    assert keeper.take(account, Amounts(1.0, cost=1.0), 86_400.0) is None
    for _ in range(59):
        assert keeper.take(account, Amounts(1.0), 86_400.0) is None
    assert (refusal := keeper.take(account, Amounts(1.0), 86_400.0)) is not None
    assert refusal.retry_after is not None
    assert keeper.take(account, Amounts(1.0), 86_400.0 + refusal.retry_after + 0.001) is None


def test_a_clock_that_was_a_year_ahead_costs_no_more_than_the_days_that_it_skipped() -> None:
    accounts = Accounts(lambda tenant, quota: Limits(cost_per_day=10))
    account = accounts.get(KEY, 0.0, 365)
    account.take(Amounts(cost=10.0))

    account.refill(60.0, 2)
    assert account.cost == 10.0
    account.take(Amounts(cost=10.0))
    account.refill(120.0, 1)
    assert account.cost == 0.0, "a step back over midnight grants nothing twice"


def test_what_was_taken_yesterday_is_not_given_back_today() -> None:
    accounts = Accounts(lambda tenant, quota: Limits(cost_per_day=20))
    account = accounts.get(KEY, 0.0, 0)
    account.take(Amounts(cost=10.0))
    account.refill(86_400.0, 1)
    account.take(Amounts(cost=3.0))
    account.take(Amounts(cost=-9.0))

    assert (account.cost, account.spent) == (20.0, 0.0)


def test_what_other_processes_name_takes_no_more_memory_than_a_full_table() -> None:
    accounts = Accounts(lambda tenant, quota: LIMITS, most=10)
    keeper = Keeper(accounts, calendar())
    nothing = Amounts()
    for member in range(MAX_MEMBERS):
        keeper.lease(member, [Ask((OTHERS, f"class {member}"), 1, nothing, 0, nothing, nothing)], 0.0)
    with pytest.raises(errors.Overloaded):
        keeper.lease(MAX_MEMBERS, [], 0.0)

    assert len(accounts) == 1
    keeper.lease(0, [], 1.0)


def test_a_need_above_the_limit_is_met_by_a_full_budget_and_leaves_a_debt() -> None:
    accounts = Accounts(lambda tenant, quota: Limits(tokens_per_minute=60))
    keeper = Keeper(accounts, calendar())
    account = accounts.get(KEY, 0.0, 0)

    assert keeper.take(account, Amounts(1.0, tokens=600.0), 0.0) is None
    assert (refusal := keeper.take(account, Amounts(1.0, tokens=1.0), 0.0)) is not None
    assert refusal.retry_after is not None
    assert 540 <= refusal.retry_after <= 542


def test_more_tenants_than_accounts_share_one_and_nobody_gets_a_new_budget() -> None:
    accounts = Accounts(lambda tenant, quota: Limits(requests_per_minute=2), most=10)
    keeper = Keeper(accounts, calendar())

    def admitted(tenant: str, now: float) -> bool:
        return keeper.take(accounts.get((tenant, "default"), now, 0), Amounts(1.0), now) is None

    first = [admitted(f"tenant {number}", 0.0) for number in range(10)]
    others = [admitted(f"tenant {number}", 0.0) for number in range(10, 20)]

    assert first == [True] * 10
    assert others.count(True) == 2, "the others share one budget"
    assert admitted("tenant 0", 0.0)
    assert not admitted("tenant 0", 0.0)
    assert len(accounts) == 11
    assert all(admitted(f"tenant {number}", 120.0) for number in range(20, 30)), "idle ones made room"
    assert len(accounts) <= 11
