"""Limit how much each tenant does in a period, with a token bucket each. The caller passes the time."""

from __future__ import annotations

from headrace.router.state.tenant_memory import TenantMemory


class Quota:
    """One token bucket per tenant.

    most      the most that a tenant may take at once, above 0
    seconds   the time in which an empty bucket fills again
    """

    def __init__(self, most: float, seconds: float, *, tenants: int = 10_000) -> None:
        self._most = most
        self._per_second = most / seconds
        # The amount left and the time of that, by tenant.
        self._left: TenantMemory[tuple[float, float]] = TenantMemory(tenants)

    def wait(self, tenant: str, amount: float, now: float) -> float:
        """Return the seconds until the tenant may take *amount*; 0 if it may now.

        An amount above the maximum counts as the maximum.
        """
        return max(min(amount, self._most) - self._available(tenant, now), 0.0) / self._per_second

    def take(self, tenant: str, amount: float, now: float) -> None:
        """Take *amount* from the tenant's bucket."""
        self._left.put(tenant, "", (max(self._available(tenant, now) - amount, 0.0), now))

    def _available(self, tenant: str, now: float) -> float:
        left, then = self._left.get(tenant, "") or (self._most, now)
        return min(left + (now - then) * self._per_second, self._most)
