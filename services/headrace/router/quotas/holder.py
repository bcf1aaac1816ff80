"""Take from the slices that this process has leased, and determine what it needs next.

The caller passes the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from headrace.router.quotas.accounts import Account, Key, Leased, shortage
from headrace.router.quotas.amounts import Amounts, Refusal
from headrace.router.quotas.keeper import MAX_BYTES, Ask, message_bytes

PERIOD_SECONDS = 1.0  # over which the demand is measured
REFUSE_SECONDS = 0.2  # for which the keeper's refusal is repeated without asking again
MIN_RETRY_SECONDS = 0.05


class Holder:
    """The slices of this process.

    share   of the limits that the keeper gives out
    """

    def __init__(self) -> None:
        self.share = 1.0
        self._active: dict[Key, Account] = {}
        self._period = 0.0

    def take(self, account: Account, need: Amounts) -> bool:
        """Take what a request needs from the slice of its account; return whether it was enough."""
        leased = account.leased
        if leased is None or self._shortage(account, leased, need) is not None:
            return False
        self.charge(account, need)
        leased.left.streams -= need.streams
        leased.taken.add(need)
        return True

    def charge(self, account: Account, amounts: Amounts) -> None:
        """Take or give back amounts, without streams, without a condition."""
        leased = self._lease_of(account)
        leased.left.requests -= amounts.requests
        leased.left.tokens -= amounts.tokens
        leased.left.cost -= amounts.cost

    def free(self, account: Account, streams: int) -> None:
        """Give back the places of streams that have ended."""
        self._lease_of(account).left.streams += streams

    def refused(self, account: Account, need: Amounts, now: float) -> Refusal | None:
        """Return the refusal that the keeper would repeat; None if it must be asked."""
        leased = account.leased
        if leased is None or now >= leased.until:
            return None
        before = leased.refused
        as_much = need.tokens >= before.tokens and need.cost >= before.cost and need.streams >= before.streams
        return leased.refusal if as_much else None

    def refuse(self, account: Account, need: Amounts, now: float, day_left: float) -> Refusal:
        """Return why the keeper granted too little for a request."""
        leased = self._lease_of(account)
        refusal = self._shortage(account, leased, need, day_left)
        assert refusal is not None, "it was not enough"
        if refusal.retry_after is not None:
            refusal = replace(refusal, retry_after=max(refusal.retry_after, MIN_RETRY_SECONDS))
        leased.refusal, leased.refused, leased.until = refusal, need, now + REFUSE_SECONDS
        return refusal

    def sums(self, waiting: Iterable[tuple[Account, Amounts]]) -> dict[Key, tuple[Account, Amounts]]:
        """Return what requests that wait need together, by account; of each, no more than a full budget."""
        needs: dict[Key, tuple[Account, Amounts]] = {}
        for account, need in waiting:
            limits = account.limits
            tokens = min(need.tokens, limits.tokens_per_minute * self.share)
            cost = min(need.cost, limits.cost_per_day * self.share)
            _, total = needs.setdefault(account.key, (account, Amounts()))
            total.add(Amounts(need.requests, tokens, cost, need.streams))
        return needs

    def asks(self, waiting: Mapping[Key, tuple[Account, Amounts]], now: float) -> list[tuple[Account, Ask]]:
        """Return what to report and ask for: accounts that requests wait for first, then others in turn.

        This gives the slices of these accounts back: until `grant`, there is nothing to take.
        """
        if now - self._period >= PERIOD_SECONDS:
            self._period = now
            for account in self._active.values():
                if (leased := account.leased) is not None:
                    leased.before, leased.taken = leased.taken, Amounts()
        asks: list[tuple[Account, Ask]] = []
        size = 0
        others = ((account, Amounts()) for key, account in list(self._active.items()) if key not in waiting)
        for account, must in (*waiting.values(), *others):
            if size >= MAX_BYTES:
                break
            size += message_bytes(account.key)
            asks.append((account, self._ask(account, must)))
            self._active[account.key] = self._active.pop(account.key)  # now the last one
        return asks

    def grant(self, account: Account, ask: Ask, granted: Amounts) -> None:
        """Take the slice that the keeper has granted. Corrections since *ask* was made are part of it."""
        leased, used = self._lease_of(account), account.used
        leased.left = Amounts(
            granted.requests - (used.requests - ask.used.requests),
            granted.tokens - (used.tokens - ask.used.tokens),
            granted.cost - (used.cost - ask.used.cost),
            granted.streams - (account.streams - ask.streams),
        )
        leased.reported = ask.used
        idle = not (account.streams or ask.must.requests or ask.extra.requests)
        if idle and used == leased.reported:
            self._active.pop(account.key, None)
            account.leased = None

    def restart(self, used: Iterable[Account]) -> None:
        """Drop all slices, which another keeper granted, and report the accounts *used* to the next one."""
        for account in self._active.values():
            account.leased = None
        self._active.clear()
        for account in used:
            self.follow(account)

    def follow(self, account: Account) -> None:
        """Report an account to the keeper."""
        self._lease_of(account)

    def _shortage(
        self, account: Account, leased: Leased, need: Amounts, day_left: float = 0.0
    ) -> Refusal | None:
        return shortage(
            account.limits, need, leased.left, level=leased.level, share=self.share, day_left=day_left
        )

    def _lease_of(self, account: Account) -> Leased:
        if account.leased is None:
            account.leased = Leased()
            self._active[account.key] = account
        return account.leased

    def _ask(self, account: Account, must: Amounts) -> Ask:
        leased = self._lease_of(account)
        before, taken = leased.before, leased.taken
        extra = Amounts(
            max(before.requests, taken.requests),
            max(before.tokens, taken.tokens),
            max(before.cost, taken.cost),
            int(max(before.requests, taken.requests)),
        )
        leased.left = Amounts()
        return Ask(account.key, account.serial, replace(account.used), account.streams, must, extra)
