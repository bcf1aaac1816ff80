"""Remember values for tenants, within bounds that no tenant can use up for the others. Plain bookkeeping."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class Memory(Generic[T]):
    """The last values, by tenant and name; beyond the bounds the tenant that holds most forgets its oldest.

    limit    values altogether
    weight   the most that they may weigh altogether, in whatever unit `put` uses
    """

    def __init__(self, limit: int, *, weight: float = math.inf) -> None:
        self._limit = limit
        self._most = weight
        self._count = 0
        self._weight = 0
        self._tenants: dict[str, _Holding[T]] = {}
        # (minus the share that a tenant held, tenant); the entries that are out of date are passed over.
        self._largest: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return self._count

    def get(self, tenant: str, name: str) -> T | None:
        """The tenant's value of that name; None if there is none, or none any more."""
        holding = self._tenants.get(tenant)
        found = None if holding is None else holding.values.get(name)
        return None if found is None else found[0]

    def put(self, tenant: str, name: str, value: T, weight: int = 0) -> None:
        """Remember a value, as the tenant's newest, in place of an older one of that name."""
        holding = self._tenants.setdefault(tenant, _Holding())
        if name in holding.values:
            self._drop(tenant, name)
        holding.values[name] = (value, weight)
        holding.weight += weight
        self._tenants[tenant] = holding
        self._count += 1
        self._weight += weight
        self._note(tenant)
        while self._count > self._limit or self._weight > self._most:
            largest = self._holding_most()
            self._drop(largest, next(iter(self._tenants[largest].values)))
            self._note(largest)

    def _drop(self, tenant: str, name: str) -> None:
        holding = self._tenants[tenant]
        _, weight = holding.values.pop(name)
        holding.weight -= weight
        self._count -= 1
        self._weight -= weight
        if not holding.values:
            del self._tenants[tenant]

    def _holding_most(self) -> str:
        while True:
            share, tenant = self._largest[0]
            if share == -self._share(tenant):
                return tenant
            heapq.heappop(self._largest)

    def _note(self, tenant: str) -> None:
        if tenant in self._tenants:
            heapq.heappush(self._largest, (-self._share(tenant), tenant))
        if len(self._largest) > 4 * len(self._tenants) + 64:
            self._largest = [(-self._share(tenant), tenant) for tenant in self._tenants]
            heapq.heapify(self._largest)

    def _share(self, tenant: str) -> float:
        """How much of the bounds the tenant holds; 0 for one that is forgotten."""
        holding = self._tenants.get(tenant)
        return 0.0 if holding is None else len(holding.values) / self._limit + holding.weight / self._most


class _Holding(Generic[T]):
    """One tenant's values, oldest first, each with its weight."""

    def __init__(self) -> None:
        self.values: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self.weight = 0
