"""Limit how much each tenant does in a while: a token bucket for each. The caller brings the clock."""

from __future__ import annotations

from headrace.router.state.tenant_memory import Memory


class Quota:
    """Counts what tenants took.

    most      what a tenant may take at once, above 0
    seconds   in which that becomes free again
    """

    def __init__(self, most: float, seconds: float, *, tenants: int = 10_000) -> None:
        self._most = most
        self._per_second = most / seconds
        self._left: Memory[tuple[float, float]] = Memory(tenants)  # by tenant, and when that was

    def wait(self, tenant: str, amount: float, now: float) -> float:
        """Seconds until the tenant may take *amount*; 0 if it may now.

        What is more than a tenant may ever take at once is as much as it may.
        """
        return max(min(amount, self._most) - self._have(tenant, now), 0.0) / self._per_second

    def take(self, tenant: str, amount: float, now: float) -> None:
        """Take *amount*."""
        self._left.put(tenant, "", (max(self._have(tenant, now) - amount, 0.0), now))

    def _have(self, tenant: str, now: float) -> float:
        left, then = self._left.get(tenant, "") or (self._most, now)
        return min(left + (now - then) * self._per_second, self._most)
