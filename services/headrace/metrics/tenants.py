"""Bound the number of tenants that metrics name."""

from __future__ import annotations

from headrace.metrics.words import OTHER
from headrace.quoting import clipped

_NAME_BYTES = 64


class TenantNames:
    """Names tenants in metrics: the first *limit* by their names, all others as "other".

    Callers choose names, so there may be any number; and a series is kept until the process ends.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[str, str] = {}

    def name(self, tenant: str) -> str:
        """Return the name of a tenant; the anonymous one has an empty name."""
        known = self._known.get(tenant)
        if known is not None:
            return known
        if not tenant or len(self._known) >= self._limit:
            return OTHER if tenant else ""
        return self._known.setdefault(tenant, clipped(tenant, _NAME_BYTES))
