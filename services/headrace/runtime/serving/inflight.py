"""Limit the calls and request bytes in flight: in total, per host and per connection.

A call is counted when it is accepted, before its message is read. The bytes of its message are counted after
they were read. Both are released when the call ends. A call beyond a limit is rejected with `errors.Busy`;
nothing waits.

One connection may hold half of each limit and one host three quarters, so that one caller cannot use up the
server. The shares are large because a router or a gateway sends the requests of all its callers over one
connection.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

from headrace import errors
from headrace.runtime.serving.limits import Limits

CONNECTION_SHARE = 0.5
HOST_SHARE = 0.75
INCOMPLETE_SHARE = 0.5  # of each limit, for messages that are not complete yet
RETRY_SECONDS = 0.5  # at least, at most twice that: jitter spreads the retries of rejected callers


class Reservation:
    """What one call holds of the budget.

    size   bytes of its request
    """

    def __init__(self, budget: InflightBudget, owners: tuple[str, ...]) -> None:
        self._budget = budget
        self._owners = owners
        self.size = 0

    def resize(self, size: int, *, share: float = 1.0) -> None:
        """Hold *size* bytes from now on. Raises Busy, and changes nothing, if they do not fit.

        share   of each limit that the bytes must fit into, together with all others in flight
        """
        self._budget.charge(self._owners, size - self.size, share)
        self.size = size

    def reserve_longest(self) -> None:
        """Hold the size of the longest message until the actual size is known. Raises Busy.

        These reservations use at most half of each limit, which leaves capacity for complete messages.
        """
        self.resize(self._budget.limits.max_message_bytes, share=INCOMPLETE_SHARE)


class InflightBudget:
    """Counts the calls and request bytes that a server has in flight."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._calls: dict[str, int] = {}
        self._bytes: dict[str, int] = {}

    @property
    def calls(self) -> int:
        """The number of calls in flight, without exempt ones."""
        return self._calls.get("", 0)

    @property
    def bytes(self) -> int:
        """The number of request bytes in flight."""
        return self._bytes.get("", 0)

    @contextmanager
    def admit(self, peer: str, *, exempt: bool = False) -> Generator[Reservation, None, None]:
        """Count one call of *peer*, and the bytes that it reserves, while the block runs. Raises Busy.

        peer     as gRPC names it, such as "ipv4:10.0.0.7:41234"
        exempt   do not count the call itself: probes must be answered under load
        """
        owners = _owners(peer)
        count = 0 if exempt else 1
        self._add(self._calls, owners, count, self.limits.max_calls, "calls")
        reservation = Reservation(self, owners)
        try:
            yield reservation
        finally:
            reservation.resize(0)
            _subtract(self._calls, owners, count)

    def charge(self, owners: tuple[str, ...], size: int, share: float = 1.0) -> None:
        """Add *size* bytes, which may be negative, within *share* of each limit. Raises Busy."""
        if size > 0:
            limit = self.limits.max_inflight_bytes * share
            self._add(self._bytes, owners, size, limit, "request bytes")
        else:
            _subtract(self._bytes, owners, -size)

    def _add(
        self, counts: dict[str, int], owners: tuple[str, ...], more: int, limit: float, what: str
    ) -> None:
        if not more:
            return
        for owner, share in zip(owners, (1.0, HOST_SHARE, CONNECTION_SHARE), strict=False):
            if counts.get(owner, 0) + more > limit * share:
                whose = (
                    "this connection" if share < HOST_SHARE else "this host" if share < 1 else "all callers"
                )
                raise errors.Busy(
                    f"too many {what} in flight from {whose}; retry after the delay",
                    retry_after=RETRY_SECONDS * random.uniform(1, 2),
                    limit=int(limit * share),
                )
        for owner in owners:
            counts[owner] = counts.get(owner, 0) + more


def _owners(peer: str) -> tuple[str, ...]:
    """Return what a call counts against: the process, its host, its connection. Unix sockets: the process."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ("",)
    host, _, _ = address.rpartition(":")
    return ("", f"{kind}:{host}", peer)


def _subtract(counts: dict[str, int], owners: tuple[str, ...], less: int) -> None:
    if not less:
        return
    for owner in owners:
        if left := counts[owner] - less:
            counts[owner] = left
        else:
            del counts[owner]  # peers come and go; an entry of zero would stay forever
