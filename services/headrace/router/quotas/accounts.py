"""Keep the budget of each tenant: levels that refill over time, and what was spent today.

An account belongs to a tenant under one class of limits. The levels of requests and tokens are the amounts
that may be taken at once. They refill continuously, from empty to full in a minute, and are below zero after
a request that used more than was estimated. Cost is counted by the day in UTC. The caller passes the time.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from headrace.router.quotas.amounts import Amounts, Refusal
from headrace.router.quotas.limits import Limits

MINUTE = 60.0
DAY = 86_400.0
MAX_ACCOUNTS = 10_000
STREAM_RETRY_SECONDS = 1.0  # advised to a caller beyond its streams: it is not known when one ends
REFILL_SECONDS = 0.001  # between refills of one budget
SWEEP_SECONDS = 10.0  # between searches for idle accounts of a full table
# The account of all tenants that find no space. Tenants of requests have no control characters.
OTHERS = "\0others"

Key: TypeAlias = tuple[str, str]  # tenant, class


@dataclass(slots=True)
class Held:
    """What another process has of an account of this one.

    serial     of its own account
    used       what it has reported as used since its account exists
    slice      what it was granted and has not reported as used; its streams are free places
    streams    that it runs
    away       whether it has not reported for a while
    """

    serial: int
    used: Amounts
    slice: Amounts = field(default_factory=Amounts)
    streams: int = 0
    away: bool = False


@dataclass(slots=True)
class Leased:
    """The slice of an account that this process has leased.

    left       what it may still take; streams are free places
    taken      in the current period
    before     in the period before
    reported   of `Account.used`, with the last lease
    level      of the budget at the keeper, as last reported
    refusal    of the last request that the lease was too small for
    refused    what that request needed
    until      the time until which similar requests are refused without asking the keeper again
    """

    left: Amounts = field(default_factory=Amounts)
    taken: Amounts = field(default_factory=Amounts)
    before: Amounts = field(default_factory=Amounts)
    reported: Amounts = field(default_factory=Amounts)
    level: Amounts = field(default_factory=Amounts)
    refusal: Refusal | None = None
    refused: Amounts = field(default_factory=Amounts)
    until: float = 0.0


@dataclass(slots=True)
class Account:
    """The budget of a tenant, and what this process uses of it.

    serial     differs from that of an earlier account of the tenant in this process
    share      of the limits that this process gives out
    requests   level, at most this share of the limit
    tokens     level, at most this share of the limit
    cost       what is left of this share of the day's budget
    spent      cost on *day*, of all processes as far as is known
    day        days since 1970 in UTC
    then       time of the levels
    most_requests   the level of a full budget: one at least, as there may be more processes than requests
    most_tokens     the level of a full budget
    held       what other processes have, by incarnation
    used       what requests of this process have taken in all, corrected when they end
    streams    that this process runs
    leased     what this process has leased; None if it leases nothing of this account
    """

    key: Key
    serial: int
    limits: Limits
    share: float
    day: int
    then: float
    requests: float = 0.0
    tokens: float = 0.0
    cost: float = 0.0
    spent: float = 0.0
    most_requests: float = 0.0
    most_tokens: float = 0.0
    held: dict[int, Held] = field(default_factory=dict)
    used: Amounts = field(default_factory=Amounts)
    streams: int = 0
    leased: Leased | None = None

    @property
    def all_streams(self) -> int:
        """Streams of all processes, and the free places that others hold."""
        if not self.held:
            return self.streams
        return self.streams + sum(held.streams + held.slice.streams for held in self.held.values())

    def measure(self) -> None:
        """Determine the levels of a full budget, after limits or share have changed."""
        limit = self.limits.requests_per_minute
        self.most_requests = max(limit * self.share, min(limit, 1.0))
        self.most_tokens = self.limits.tokens_per_minute * self.share

    def fill(self) -> None:
        """Fill the levels."""
        self.measure()
        self.requests, self.tokens = self.most_requests, self.most_tokens
        self.cost = self.limits.cost_per_day * self.share - self.spent

    def refill(self, now: float, day: int) -> None:
        """Refill the levels by what the limits allow since the last time."""
        seconds = now - self.then
        if seconds < REFILL_SECONDS and day == self.day:
            return
        minutes = seconds / MINUTE
        if self.requests < (most := self.most_requests):
            self.requests = min(self.requests + minutes * self.limits.requests_per_minute * self.share, most)
        if self.tokens < (most := self.most_tokens):
            self.tokens = min(self.tokens + minutes * self.limits.tokens_per_minute * self.share, most)
        if day > self.day or day < self.day - 1:  # not after a small step back over midnight
            self.day, self.spent = day, 0.0
            self.cost = self.limits.cost_per_day * self.share
        self.then = now

    def give_out(self, share: float) -> None:
        """Give out another share of the limits; a smaller one leaves the rest of the budget to others."""
        if share < self.share:
            self.scale(share / self.share)
        self.share = share
        self.measure()
        self.balance()

    def scale(self, factor: float) -> None:
        """Keep a part of the budget, above 0."""
        self.requests *= factor
        self.tokens *= factor
        self.cost *= factor

    def balance(self) -> None:
        """Give out all of the day's budget that is left, unless others may have spent some of it."""
        if self.share >= 1.0 and not any(held.away for held in self.held.values()):
            self.cost = self.limits.cost_per_day - self.spent

    def available(self) -> Amounts:
        """Return what there is to give out."""
        most = self.limits.concurrent_streams
        if most == math.inf:
            return Amounts(self.requests, self.tokens, self.cost, MANY)
        streams = max(math.floor(most * self.share), min(int(most), 1)) - self.all_streams
        return Amounts(self.requests, self.tokens, self.cost, streams)

    def fits(self, need: Amounts) -> bool:
        """Return whether there is certainly enough for a request: the same as `shortage`, in less time."""
        return (
            self.requests >= need.requests
            and self.tokens >= need.tokens
            and self.cost >= need.cost
            and self.streams + need.streams <= self.limits.concurrent_streams
            and not self.held
            and self.share == 1.0
        )

    def take(self, need: Amounts) -> None:
        """Take *need*, of finite amounts, from the budget; negative amounts are given back."""
        limits = self.limits
        self.requests -= need.requests
        self.tokens -= need.tokens
        if need.requests < 0 and self.requests > limits.requests_per_minute:
            self.requests = limits.requests_per_minute
        if need.tokens < 0 and self.tokens > limits.tokens_per_minute:
            self.tokens = limits.tokens_per_minute
        if need.cost:
            cost = max(need.cost, -self.spent)  # of what was taken yesterday, nothing is given back today
            self.cost -= cost
            self.spend(cost)

    def spend(self, cost: float) -> None:
        """Count cost, without taking it from what is left."""
        if self.limits.cost_per_day != math.inf:
            self.spent = max(self.spent + cost, 0.0)

    def limit(self, limits: Limits) -> None:
        """Apply other limits."""
        old, self.limits = self.limits, limits
        self.measure()
        self.requests = _within(self.requests, old.requests_per_minute, self.most_requests)
        self.tokens = _within(self.tokens, old.tokens_per_minute, self.most_tokens)
        if math.inf in (old.cost_per_day, limits.cost_per_day):
            self.cost, self.spent = limits.cost_per_day * self.share, 0.0
        else:
            self.cost += (limits.cost_per_day - old.cost_per_day) * self.share

    def idle(self, now: float, day: int) -> bool:
        """Return whether it is as a new account would be."""
        self.refill(now, day)
        full = self.requests >= self.most_requests and self.tokens >= self.most_tokens
        return full and not (self.spent or self.all_streams or self.leased)


def shortage(
    limits: Limits, need: Amounts, have: Amounts, *, level: Amounts, share: float, day_left: float
) -> Refusal | None:
    """Return why *have* is not enough for *need*; None if it is.

    level      of the budget that *have* is taken from, which says how long the caller should wait
    share      of the limits that this budget gives out
    day_left   seconds until the next day

    A need of tokens or cost above the limit is met by a full budget. Without a need of a kind, its budget
    does not matter.
    """
    if need.cost and (have.cost <= 0 or have.cost < min(need.cost, limits.cost_per_day * share)):
        return Refusal("cost_per_day", limits.cost_per_day, day_left if limits.cost_per_day else None)
    if have.requests < need.requests:
        seconds = _until(need.requests, level.requests, limits.requests_per_minute * share)
        return Refusal("requests_per_minute", limits.requests_per_minute, seconds)
    tokens = min(need.tokens, limits.tokens_per_minute * share)
    if need.tokens and (have.tokens <= 0 or have.tokens < tokens):
        seconds = _until(tokens, level.tokens, limits.tokens_per_minute * share)
        return Refusal("tokens_per_minute", limits.tokens_per_minute, seconds)
    if need.streams and have.streams < need.streams:
        most = limits.concurrent_streams
        return Refusal("concurrent_streams", most, STREAM_RETRY_SECONDS if most else None)
    return None


class Calendar:
    """Converts a time on the monotonic clock to a day in UTC."""

    def __init__(self) -> None:
        self.sync()

    def sync(self, offset: float | None = None) -> None:
        """Read the clock of the system, which may have been set; *offset* is its lead, for tests."""
        self._offset = time.time() - time.monotonic() if offset is None else offset
        self._day, self._began = 0, math.inf  # of the day that was asked for last

    def day(self, now: float) -> int:
        """Return the number of days since 1970."""
        if not self._began <= now < self._began + DAY:
            self._day = int((now + self._offset) // DAY)
            self._began = self._day * DAY - self._offset
        return self._day

    def left(self, now: float) -> float:
        """Return the seconds until the next day."""
        return DAY - (now + self._offset) % DAY


class Accounts:
    """The accounts of all tenants, at most *most*: further tenants share one.

    limits   returns the limits of a tenant and class
    share    of the limits that new accounts give out

    A table without a bound could be filled by a caller that names a new tenant with each request, and a table
    that forgets accounts would give them a new budget.
    """

    def __init__(self, limits: Callable[[str, str], Limits], *, most: int = MAX_ACCOUNTS) -> None:
        self._limits = limits
        self._most = most
        self._accounts: dict[Key, Account] = {}
        self._serials = itertools.count(1)
        self._swept = -math.inf
        self.share = 1.0

    def __len__(self) -> int:
        return len(self._accounts)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def of(self, keys: Iterable[Key]) -> list[Account]:
        """Return the accounts of *keys* that exist."""
        return [account for key in keys if (account := self._accounts.get(key)) is not None]

    def find(self, key: Key) -> Account | None:
        """Return the account of a tenant and class; None if there is none."""
        return self._accounts.get(key)

    def get(self, key: Key, now: float, day: int) -> Account:
        """Return the account of a tenant and class, which is new if there is none."""
        if (account := self._accounts.get(key)) is not None:
            return account
        if key[0] == OTHERS:
            key = (OTHERS, self._limits(*key).name)  # one for each class that exists
            if (account := self._accounts.get(key)) is not None:
                return account
        elif len(self._accounts) >= self._most:
            self._sweep(now, day)
            if len(self._accounts) >= self._most:
                return self.get((OTHERS, key[1]), now, day)
        account = Account(key, next(self._serials), self._limits(*key), self.share, day, now)
        account.fill()
        self._accounts[key] = account
        return account

    def refresh(self) -> None:
        """Apply limits that have changed."""
        for key, account in self._accounts.items():
            account.limit(self._limits(*key))

    def _sweep(self, now: float, day: int) -> None:
        if now - self._swept >= SWEEP_SECONDS:
            self._swept = now
            for key in [key for key, account in self._accounts.items() if account.idle(now, day)]:
                del self._accounts[key]


MANY = 1 << 30  # streams, where they are not limited


def _until(need: float, level: float, per_minute: float) -> float | None:
    """Return the seconds until a level reaches *need*; None if it never does."""
    return max(need - level, 0.0) / per_minute * MINUTE if per_minute > 0 else None


def _within(level: float, old: float, most: float) -> float:
    """Return a level under another limit. It was full if the *old* limit did not apply."""
    return min(level, most) if old != math.inf and most != math.inf else most
