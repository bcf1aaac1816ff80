"""Take from the budgets of tenants, for requests of this process and for other processes that lease slices.

Any process can be the keeper of others. A keeper gives out no more than its share of each budget: the part of
all known processes that lease from it, itself included if it does not lease elsewhere. So processes that
cannot reach each other admit no more together than the limits allow. Everything that is uncertain counts as
used: slices of a process that does not return, reports that arrive twice. The caller passes the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.router.quotas.accounts import MANY, Account, Accounts, Calendar, Held, Key
from headrace.router.quotas.amounts import Amounts, Refusal

MEMBER_SECONDS = 3.0  # without a report, after which a process is away
FORGET_SECONDS = 3600.0  # after which the reports of a process that is away are forgotten
MAX_BYTES = 24_000  # of the states, and of the asks, of one message: both fit into one datagram


class Ask(NamedTuple):
    """What another process reports and asks for, of one account.

    serial    of its account
    used      what its requests have taken since its account exists
    streams   that it runs
    must      what requests that wait need
    extra     what it expects to need until its next report
    """

    key: Key
    serial: int
    used: Amounts
    streams: int
    must: Amounts
    extra: Amounts


class State(NamedTuple):
    """The budget of an account, as its keeper has it."""

    key: Key
    requests: float
    tokens: float
    spent: float
    day: int


def message_bytes(key: Key) -> int:
    """Return the most bytes that a state or an ask of an account takes in a message."""
    return 180 + 4 * len(key[0]) + 4 * len(key[1])


@dataclass(slots=True)
class _Member:
    seen: float
    away: bool = False


class Keeper:
    """The budgets of this process.

    known     number of processes that share the limits, as far as is known
    leasing   whether this process leases from another one
    """

    def __init__(self, accounts: Accounts, calendar: Calendar) -> None:
        self.known = 1
        self.leasing = False
        self._accounts = accounts
        self._calendar = calendar
        self._members: dict[int, _Member] = {}
        self._here = 0  # members that are not away
        self._version = 0
        self._versions: dict[Key, int] = {}  # of accounts at their last change, oldest first

    @property
    def share(self) -> float:
        """The part of the limits that this process gives out: 1 unless known processes are missing."""
        if self.known <= 1:
            return 1.0
        # Others may still believe in it although it leases elsewhere: then it counts for that keeper.
        return min(max(self._here + (not self.leasing), 1) / self.known, 1.0)

    def take(self, account: Account, need: Amounts, now: float) -> Refusal | None:
        """Take what a request of this process needs; return why it may not be admitted, if so."""
        share = self.share
        account.refill(now, self._calendar.day(now), share)
        refusal = account.shortage(need, account.available(share), share, self._calendar.left(now))
        if refusal is None:
            self.charge(account, need)
        return refusal

    def charge(self, account: Account, amounts: Amounts) -> None:
        """Take or give back amounts without a condition."""
        account.take(amounts)
        if self._here:
            self._mark(account)

    def lease(self, member: int, asks: Sequence[Ask], now: float) -> list[Amounts]:
        """Take the report of another process, and return its new slices: one for each of *asks*.

        The new slice of an account replaces the one before. Infinite amounts are not limited.
        """
        self._see(member, now)
        return [self._lease(member, ask, now) for ask in asks]

    def _lease(self, member: int, ask: Ask, now: float) -> Amounts:
        share, day = self.share, self._calendar.day(now)
        account = self._accounts.get(ask.key, now, day)
        account.refill(now, day, share)
        if account.key != ask.key:  # of all tenants that find no space here: nothing is taken back
            return self._grant(account, ask)
        held = account.held.get(member)
        if held is None:  # what it used before is in the states that it brings
            held = account.held[member] = Held(ask.serial, ask.used)
        elif held.serial != ask.serial:
            held.serial, held.used = ask.serial, Amounts()
        least = (min(account.requests, 0.0), min(account.tokens, 0.0))
        account.take(
            Amounts(
                ask.used.requests - held.used.requests - held.slice.requests,
                ask.used.tokens - held.used.tokens - held.slice.tokens,
                ask.used.cost - held.used.cost - held.slice.cost,
            )
        )
        if held.away:
            # It was limited to its own share meanwhile, much of it long ago: only cost is not forgotten.
            account.requests, account.tokens = max(account.requests, least[0]), max(account.tokens, least[1])
        held.used, held.streams, held.slice, held.away = ask.used, ask.streams, Amounts(), False
        granted = self._grant(account, ask)
        held.slice = _finite(granted)
        return granted

    def _grant(self, account: Account, ask: Ask) -> Amounts:
        """Take a slice from the budget."""
        have, must, extra = account.available(self.share), ask.must, ask.extra
        parts = 2 * max(self._here, 1)
        granted = Amounts(
            _whole(_granted(must.requests, extra.requests, have.requests, parts)),
            _granted(must.tokens, extra.tokens, have.tokens, parts),
            _granted(must.cost, extra.cost, have.cost, parts),
            MANY if have.streams >= MANY else int(_granted(must.streams, extra.streams, have.streams, parts)),
        )
        account.take(_finite(granted))
        self._mark(account)
        return granted

    # States: how the next keeper learns what this one knows.

    def merge(self, member: int, states: Iterable[State], now: float) -> None:
        """Take the states that a process brings from its keeper before, of accounts new to this one."""
        day = self._calendar.day(now)
        for state in states:
            account = self._accounts.get(state.key, now, day)
            if member not in account.held:
                account.refill(now, day, self.share)
                account.requests = min(account.requests, state.requests)
                account.tokens = min(account.tokens, state.tokens)
                if state.day == account.day:
                    account.spent = max(account.spent, state.spent)
                self._mark(account)

    def adopt(self, states: Iterable[State], now: float) -> None:
        """Take the states of the keeper of this process, in case that it is the next one."""
        if self._here:
            return  # others lease here: this process cannot reach their keeper, or not for long
        for state in states:
            account = self._accounts.get(state.key, now, state.day)
            account.requests = min(state.requests, account.limits.requests_per_minute)
            account.tokens = min(state.tokens, account.limits.tokens_per_minute)
            account.spent, account.day, account.then = state.spent, state.day, now

    def changes(self, since: int, now: float) -> tuple[int, list[State]]:
        """Return the oldest states that changed after the version *since*, and the version that they make."""
        changed: list[tuple[Key, int]] = []
        for key, version in reversed(self._versions.items()):
            if version <= since:
                break
            changed.append((key, version))
        if not changed:
            return self._version, []
        keys, size = [], 0
        while changed and size < MAX_BYTES:
            key, since = changed.pop()
            keys.append(key)
            size += message_bytes(key)
        return since, self.states(keys, now)

    def states(self, keys: Iterable[Key], now: float) -> list[State]:
        """Return the states of accounts."""
        found = self._accounts.of(keys)
        for account in found:
            account.refill(now, self._calendar.day(now), self.share)
        return [State(one.key, one.requests, one.tokens, one.spent, one.day) for one in found]

    def tick(self, now: float) -> None:
        """Notice processes that do not report any more: their streams are free for others."""
        self._calendar.sync()
        for incarnation, member in list(self._members.items()):
            if not member.away and now - member.seen > MEMBER_SECONDS:
                member.away = True
                for account in self._accounts:
                    if (held := account.held.get(incarnation)) is not None:
                        held.away, held.streams, held.slice.streams = True, 0, 0
            if now - member.seen > FORGET_SECONDS:
                del self._members[incarnation]
                for account in self._accounts:
                    account.held.pop(incarnation, None)
        self._count()

    def _see(self, incarnation: int, now: float) -> None:
        if not self._here:
            # Nobody has followed the changes so far: the first one to lease receives all accounts.
            for account in self._accounts:
                self._mark(account)
        self._members[incarnation] = _Member(now)
        self._count()

    def _count(self) -> None:
        self._here = sum(not member.away for member in self._members.values())
        self._accounts.share = self.share
        if not self._here:
            self._versions.clear()

    def _mark(self, account: Account) -> None:
        self._version += 1
        self._versions.pop(account.key, None)
        self._versions[account.key] = self._version


def _granted(must: float, extra: float, have: float, parts: int) -> float:
    """Return a slice: what requests that wait need if it is there, and some of the rest."""
    if have == math.inf:
        return math.inf
    first = max(min(must, have), 0.0)
    return first + max(min(extra, (have - first) / parts), 0.0)


def _whole(requests: float) -> float:
    """Return a number of requests without its fraction, which would be of no use to anybody."""
    return requests if requests == math.inf else math.floor(requests)


def _finite(granted: Amounts) -> Amounts:
    """Return a slice without the amounts that are not limited."""
    return Amounts(
        0.0 if granted.requests == math.inf else granted.requests,
        0.0 if granted.tokens == math.inf else granted.tokens,
        0.0 if granted.cost == math.inf else granted.cost,
        0 if granted.streams == MANY else granted.streams,
    )
