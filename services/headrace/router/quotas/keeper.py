"""Take from the budgets of tenants, for requests of this process and for other processes that lease slices.

Any process can be the keeper of others. A keeper gives out its share of each budget: the part of all known
processes that lease from it, itself included if it does not lease elsewhere. So processes that cannot reach
each other admit no more together than the limits allow: when some are lost, the keeper sets their part of
what is left aside, and they take the same part as what they begin with; when they return, they bring what
they have left. Everything that is uncertain counts as used, such as slices of a process that does not return.
The caller passes the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace import errors
from headrace.router.quotas.accounts import MANY, Account, Accounts, Calendar, Held, Key, shortage
from headrace.router.quotas.amounts import Amounts, Refusal

MEMBER_SECONDS = 3.0  # without a report, after which a process is away
MAX_MEMBERS = 256  # processes that are known at a time
FORGET_SECONDS = 600.0  # after which the reports of a process that is away are forgotten
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
    cost: float
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
    """The budgets of this process."""

    def __init__(self, accounts: Accounts, calendar: Calendar) -> None:
        self._accounts = accounts
        self._calendar = calendar
        self._known = 1  # processes that share the limits
        self._leasing = False  # whether this process leases from another one
        self._members: dict[int, _Member] = {}
        self._here = 0  # members that are not away
        self._version = 0
        self._versions: dict[Key, int] = {}  # of accounts at their last change, oldest first

    @property
    def share(self) -> float:
        """The part of the limits that this process gives out: 1 unless known processes are missing.

        If it gives out nothing, because it leases from another one, it is the part that it would begin with.
        """
        return min(max(self._here + (not self._leasing), 1) / self._known, 1.0)

    def know(self, processes: int, now: float) -> None:
        """Set the number of processes that share the limits."""
        self._known = processes
        self._count(now)

    def take(self, account: Account, need: Amounts, now: float) -> Refusal | None:
        """Take what a request of this process needs; return why it may not be admitted, if so."""
        account.refill(now, self._calendar.day(now))
        if account.fits(need):
            self.charge(account, need)
            return None
        have = account.available()
        refusal = shortage(
            account.limits,
            need,
            have,
            level=have,
            share=account.share,
            day_left=self._calendar.left(now),
        )
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

        Raises Overloaded if there are too many processes.
        """
        if member not in self._members and len(self._members) >= MAX_MEMBERS:
            raise errors.Overloaded(
                f"{MAX_MEMBERS} processes of routers share quotas, the most that are allowed",
                retry_after=FORGET_SECONDS,
            )
        self._see(member, now)
        return [self._lease(member, ask, now) for ask in asks]

    def leave(self, member: int, asks: Sequence[Ask], now: float) -> None:
        """Take the last report of another process, which stops."""
        self.lease(member, [ask._replace(must=Amounts(), extra=Amounts()) for ask in asks], now)
        self._forget(member)
        self._count(now)

    def _lease(self, member: int, ask: Ask, now: float) -> Amounts:
        day = self._calendar.day(now)
        account = self._accounts.get(ask.key, now, day)
        account.refill(now, day)
        if account.key != ask.key:  # of all tenants that find no space here: nothing is taken back
            return self._grant(account, ask)
        if (held := account.held.get(member)) is None:
            held = account.held[member] = Held(ask.serial, ask.used)
        elif held.serial != ask.serial:
            held.serial, held.used = ask.serial, Amounts()
        used, before, slice = ask.used, held.used, held.slice
        if held.away:  # it took from what was set aside, and has brought what is left of that
            account.spend(used.cost - before.cost - slice.cost)
        else:
            account.take(
                Amounts(
                    used.requests - before.requests - slice.requests,
                    used.tokens - before.tokens - slice.tokens,
                    used.cost - before.cost - slice.cost,
                )
            )
        held.used, held.streams, held.slice, held.away = used, ask.streams, Amounts(), False
        account.balance()
        granted = self._grant(account, ask)
        held.slice = _finite(granted)
        return granted

    def _grant(self, account: Account, ask: Ask) -> Amounts:
        """Take a slice from the budget."""
        have, must, extra = account.available(), ask.must, ask.extra
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

    # How budgets move from keeper to keeper.

    def lease_elsewhere(self, leasing: bool, now: float) -> list[State]:
        """Begin to lease from another process, or from none; return what to bring to it.

        It is taken out of the budgets here, except for the part of the members that still lease here.
        """
        brought = []
        its_own = not self._leasing or not self._here  # whether any part is its own
        self._leasing = leasing
        if leasing and its_own:
            others, day = self._here / (self._here + 1), self._calendar.day(now)
            for account in self._accounts:
                account.refill(now, day)
                before = self._state(account)
                account.requests, account.tokens, account.cost = (
                    level if level == math.inf else level * others
                    for level in (account.requests, account.tokens, account.cost)
                )
                brought.append(
                    before._replace(
                        requests=_rest(before.requests, account.requests),
                        tokens=_rest(before.tokens, account.tokens),
                        cost=_rest(before.cost, account.cost),
                    )
                )
                account.share = self.share
                account.measure()
        self._count(now)
        return brought

    def merge(self, member: int, states: Iterable[State], now: float) -> None:
        """Take what a process brings. Called before its first lease."""
        known = self._members.get(member)
        if known is not None and not known.away:
            return  # nothing was set aside for it: its next report says what it has used
        day = self._calendar.day(now)
        for state in states:
            account = self._accounts.get(state.key, now, day)
            account.refill(now, day)
            account.requests = min(account.requests + state.requests, account.limits.requests_per_minute)
            account.tokens = min(account.tokens + state.tokens, account.limits.tokens_per_minute)
            if state.day == account.day:
                account.cost = min(account.cost + state.cost, account.limits.cost_per_day)
                if member not in account.held:
                    account.spend(max(state.spent - account.spent, 0.0))
            self._mark(account)

    def adopt(self, states: Iterable[State], share: float, now: float) -> None:
        """Take the part of this process of the budgets of its keeper, in case that it is lost.

        share   of the limits that the keeper gives out
        """
        for state in states:
            account = self._accounts.get(state.key, now, state.day)
            if account.leased is not None:
                account.leased.level = Amounts(state.requests, state.tokens, state.cost)
            if self._here:
                continue  # others lease here, and take from what is here
            account.requests, account.tokens, account.cost = state.requests, state.tokens, state.cost
            account.scale(min(account.share / share, 1.0))
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
            account.refill(now, self._calendar.day(now))
        return [self._state(account) for account in found]

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
                self._forget(incarnation)
        self._count(now)

    def _state(self, account: Account) -> State:
        return State(account.key, account.requests, account.tokens, account.cost, account.spent, account.day)

    def _forget(self, incarnation: int) -> None:
        del self._members[incarnation]
        for account in self._accounts:
            account.held.pop(incarnation, None)
            account.balance()

    def _see(self, incarnation: int, now: float) -> None:
        if not self._here:
            # Nobody has followed the changes so far: the first one to lease receives all accounts.
            for account in self._accounts:
                self._mark(account)
        self._members[incarnation] = _Member(now)
        self._count(now)

    def _count(self, now: float) -> None:
        """Give out the share that follows from the processes that are here."""
        self._here = sum(not member.away for member in self._members.values())
        if not self._here:
            self._versions.clear()
        if (share := self.share) != self._accounts.share:
            self._accounts.share = share
            day = self._calendar.day(now)
            for account in self._accounts:
                account.refill(now, day)
                account.give_out(share)

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


def _rest(before: float, after: float) -> float:
    return before if before == math.inf else before - after


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
