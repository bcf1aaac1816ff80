"""Report what metrics have counted, for `headrace top`: figures of tiers, and what tenants used.

The processes of one router add their figures up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headrace import attributes
from headrace.metrics import catalogue
from headrace.metrics.instruments import Counter, Histogram
from headrace.router.siblings import Siblings
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import routing_service_pb2 as routing

MAX_TENANTS = 100
_FIGURES, _TENANTS = "figures", "tenants"


class Figures:
    """The figures of a router.

    tiers      names of its tiers
    siblings   its other processes
    """

    def __init__(self, tiers: Iterable[str], siblings: Siblings) -> None:
        self._tiers = tuple(tiers)
        self._siblings = siblings
        siblings.on_ask(_FIGURES, self._own_figures)
        siblings.on_ask(_TENANTS, self._own_tenants)

    async def of_tiers(self) -> dict[str, routing.TierFigures]:
        """Return the figures of each tier, as this router measures them."""
        total: dict[str, routing.TierFigures] = {name: routing.TierFigures() for name in self._tiers}
        for figures in (await self._own_figures(), *await self._siblings.ask_all(_FIGURES)):
            for name, own in figures.items():
                add(total[name], routing.TierFigures.FromString(own))
        return total

    async def of_tenants(self) -> list[admin.TenantUse]:
        """Return what each tenant used, those with most requests first."""
        total: dict[str, admin.TenantUse] = {}
        for used in (await self._own_tenants(), *await self._siblings.ask_all(_TENANTS)):
            for name, own in used.items():
                use = admin.TenantUse.FromString(own)
                tenant = total.setdefault(name, admin.TenantUse(tenant=name))
                tenant.requests += use.requests
                tenant.prompt_tokens += use.prompt_tokens
                tenant.completion_tokens += use.completion_tokens
                if use.HasField("cost"):
                    tenant.cost += use.cost
        return _busiest(total.values())

    async def _own_figures(self) -> Mapping[str, bytes]:
        return {
            name: routing.TierFigures(
                time_to_first_token=_distribution(catalogue.TIME_TO_FIRST_TOKEN, name),
                inter_token_latency=_distribution(catalogue.INTER_TOKEN_LATENCY, name),
                failovers=_count(catalogue.FAILOVERS, name),
            ).SerializeToString()
            for name in self._tiers
        }

    async def _own_tenants(self) -> Mapping[str, bytes]:
        found: dict[str, admin.TenantUse] = {}

        def of(labels: Mapping[str, str]) -> admin.TenantUse:
            name = labels.get(attributes.TENANT, "")
            return found.setdefault(name, admin.TenantUse(tenant=name))

        for labels, requests in catalogue.TENANT_REQUESTS:
            of(labels).requests += int(requests.value)
        for labels, tokens in catalogue.TENANT_TOKENS:
            kind = labels[attributes.TOKEN_KIND]
            if kind == "prompt":
                of(labels).prompt_tokens += int(tokens.value)
            elif kind == "completion":
                of(labels).completion_tokens += int(tokens.value)
        for labels, cost in catalogue.TENANT_COST:
            of(labels).cost += cost.value
        return {use.tenant: use.SerializeToString() for use in _busiest(found.values())}


def add(total: routing.TierFigures, more: routing.TierFigures) -> None:
    """Add the figures of another process."""
    for name in ("time_to_first_token", "inter_token_latency"):
        one, other = getattr(total, name), getattr(more, name)
        if not one.bounds:
            one.CopyFrom(other)
        elif one.bounds == other.bounds:
            one.counts[:] = [sum(pair) for pair in zip(one.counts, other.counts, strict=True)]
    total.failovers += more.failovers
    total.batches += more.batches
    total.batch_fill += more.batch_fill


def _busiest(tenants: Iterable[admin.TenantUse]) -> list[admin.TenantUse]:
    return sorted(tenants, key=lambda use: (-use.requests, use.tenant))[:MAX_TENANTS]


def _distribution(metric: Histogram, tier: str) -> routing.Distribution:
    counts = [0] * (len(metric.bounds) + 1)
    for labels, series in metric:
        if labels.get(attributes.TIER) == tier:
            counts = [sum(pair) for pair in zip(counts, series.counts, strict=True)]
    return routing.Distribution(bounds=metric.bounds, counts=counts)


def _count(metric: Counter, tier: str) -> int:
    return int(sum(series.value for labels, series in metric if labels.get(attributes.TIER) == tier))
