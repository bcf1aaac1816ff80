"""Keep values by tenant, within limits that no tenant can exhaust for the others."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class TenantMemory(Generic[T]):
    """The latest values, by tenant and name. Beyond the limits, the tenant with the most loses its oldest.

    limit    number of values of all tenants
    weight   total weight of all values, in the unit of `put`
    """

    def __init__(self, limit: int, *, weight: float = math.inf) -> None:
        self._limit = limit
        self._max_weight = weight
        self._count = 0
        self._weight = 0
        self._tenants: dict[str, _Holding[T]] = {}
        # A heap of (minus the share that a tenant held, tenant); outdated entries are skipped.
        self._largest: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return self._count

    def get(self, tenant: str, name: str) -> T | None:
        """Return the tenant's value of that name; None if there is none."""
        holding = self._tenants.get(tenant)
        found = None if holding is None else holding.values.get(name)
        return None if found is None else found[0]

    def put(self, tenant: str, name: str, value: T, weight: int = 0) -> None:
        """Store a value as the tenant's newest; it replaces an older one of that name."""
        if (holding := self._tenants.get(tenant)) is None:
            holding = _Holding()
        elif name in holding.values:
            self._drop(tenant, name)
        holding.values[name] = (value, weight)
        holding.weight += weight
        self._tenants[tenant] = holding
        self._count += 1
        self._weight += weight
        self._push(tenant)
        while self._count > self._limit or self._weight > self._max_weight:
            largest = self._largest_tenant()
            self._drop(largest, next(iter(self._tenants[largest].values)))
            self._push(largest)

    def _drop(self, tenant: str, name: str) -> None:
        holding = self._tenants[tenant]
        _, weight = holding.values.pop(name)
        holding.weight -= weight
        self._count -= 1
        self._weight -= weight
        if not holding.values:
            del self._tenants[tenant]

    def _largest_tenant(self) -> str:
        while True:
            share, tenant = self._largest[0]
            if share == -self._share(tenant):
                return tenant
            heapq.heappop(self._largest)

    def _push(self, tenant: str) -> None:
        if tenant in self._tenants:
            heapq.heappush(self._largest, (-self._share(tenant), tenant))
        if len(self._largest) > 4 * len(self._tenants) + 64:
            self._largest = [(-self._share(tenant), tenant) for tenant in self._tenants]
            heapq.heapify(self._largest)

    def _share(self, tenant: str) -> float:
        """Return the share of the limits that the tenant uses; 0 for an unknown tenant."""
        holding = self._tenants.get(tenant)
        if holding is None:
            return 0.0
        return len(holding.values) / self._limit + holding.weight / self._max_weight


class _Holding(Generic[T]):
    """One tenant's values, oldest first, each with its weight."""

    def __init__(self) -> None:
        self.values: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self.weight = 0
