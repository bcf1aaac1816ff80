"""Bound what a process has in hand: calls and bytes of requests, in all, per host and per connection.

A call is counted when it is accepted, before its message is read, and the bytes of its message when it has
been. Both are released when the call ends. What does not fit is refused as `errors.Busy`; nothing waits.

One connection may take half of everything, one host three quarters: a flood leaves room for callers from
elsewhere. A router or a gateway is one connection for all of its callers, so the shares are large.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from headrace import errors
from headrace.runtime.limits import Limits

CONNECTION_SHARE = 0.5
HOST_SHARE = 0.75
SLOW_SHARE = 0.5  # for messages that are not there yet
RETRY_SECONDS = 0.5  # at least; up to twice that, so that callers that were refused together come back apart


class Hold:
    """What one call has in hand.

    size   bytes of its request
    """

    def __init__(self, budget: Budget, owners: tuple[str, ...]) -> None:
        self._budget = budget
        self._owners = owners
        self.size = 0

    def resize(self, size: int, *, share: float = 1.0) -> None:
        """Have *size* bytes in hand from now on. Raises Busy, and changes nothing, if they do not fit.

        share   of each limit, which they must fit together with all that is in hand
        """
        self._budget.take(self._owners, size - self.size, share)
        self.size = size

    def reserve(self) -> None:
        """Have the longest message in hand, until it is known how long it is. Raises Busy.

        Half of everything stays free of such: messages that never end leave room for those that are there.
        """
        self.resize(self._budget.limits.message_bytes, share=SLOW_SHARE)


class Budget:
    """Counts the calls and bytes that a server has in hand."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._calls: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @property
    def calls(self) -> int:
        """Calls in hand, those that are exempt not counted."""
        return self._calls[""]

    @property
    def held(self) -> int:
        """Bytes of requests in hand."""
        return self._bytes[""]

    @contextmanager
    def call(self, peer: str, *, exempt: bool = False) -> Generator[Hold, None, None]:
        """Count one call of *peer* while the block runs, and what it holds. Raises Busy.

        peer     as gRPC names it, such as "ipv4:10.0.0.7:41234"
        exempt   the call itself is not counted: a probe, which must be answered under load, too
        """
        owners = _owners(peer)
        count = 0 if exempt else 1
        self._add(self._calls, owners, count, self.limits.calls, "calls")
        hold = Hold(self, owners)
        try:
            yield hold
        finally:
            hold.resize(0)
            _subtract(self._calls, owners, count)

    def take(self, owners: tuple[str, ...], size: int, share: float = 1.0) -> None:
        """Book *size* bytes more, or less, within *share* of the limits. Raises Busy."""
        if size > 0:
            self._add(self._bytes, owners, size, self.limits.held_bytes * share, "bytes of requests")
        else:
            _subtract(self._bytes, owners, -size)

    def _add(self, counts: Counter[str], owners: tuple[str, ...], more: int, limit: float, what: str) -> None:
        for owner, share in zip(owners, (1.0, HOST_SHARE, CONNECTION_SHARE), strict=False):
            if more and counts[owner] + more > limit * share:
                whose = (
                    "this connection" if share < HOST_SHARE else "this host" if share < 1 else "all callers"
                )
                raise errors.Busy(
                    f"the server has as many {what} in hand as it takes of {whose}; try again",
                    retry_after=RETRY_SECONDS * random.uniform(1, 2),
                    limit=int(limit * share),
                )
        for owner in owners:
            counts[owner] += more


def _owners(peer: str) -> tuple[str, ...]:
    """Who a call counts against: the process, its host and its connection. A Unix socket has neither."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ("",)
    host, _, _ = address.rpartition(":")
    return ("", f"{kind}:{host}", peer)


def _subtract(counts: Counter[str], owners: tuple[str, ...], less: int) -> None:
    for owner in owners:
        counts[owner] -= less
        if not counts[owner]:
            del counts[owner]  # peers come and go; none stays
