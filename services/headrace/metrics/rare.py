"""Make the series of rare events exist from the start.

Prometheus computes no increase from the first value of a series. If a series appeared with its first event,
alerts would miss that event.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace import errors
from headrace.metrics import catalogue, changes, upstream

_REFUSALS = (
    errors.Overloaded,
    errors.Shed,
    errors.TtftUnattainable,
    errors.DeadlineUnattainable,
)
_LOST_WORKERS = (errors.WorkerLost, errors.WorkerDraining, errors.SequenceFault)
_LOST_BATCHERS = (errors.BatcherLost, errors.Draining, errors.WorkerLost)
_WASTE = ("cancel", "deadline", "failover", "over_generation", "slow_reader")


def create_for_router(tiers: Iterable[str]) -> None:
    """Create the series of a router."""
    _create_refusals("", (errors.Busy, errors.TenantQuota))
    # They start the first worker of a tier that has none: k8s/components/autoscaling/to-zero.
    catalogue.REQUESTS.of(tier="", model="", outcome="failed", error=errors.NoWorkers.reason, finish="")
    for tier in tiers:
        catalogue.ROUTED.of(tier=tier, route="health")
        _create_refusals(tier, _REFUSALS)
        _create_failovers(tier, _LOST_BATCHERS)
        catalogue.WASTED_TOKENS.of(tier=tier, cause="draft")
    for measure in ("quality", "errors", "cost"):
        changes.CANARY_ROLLBACKS.of(measure=measure)
    changes.DECISION_LOG_DROPPED.of()


def create_for_batcher(tier: str) -> None:
    """Create the series of a batcher."""
    _create_refusals("", (errors.Busy,))
    _create_refusals(tier, _REFUSALS)
    _create_failovers(tier, _LOST_WORKERS)
    catalogue.PAUSED.of(tier=tier)
    for cause in _WASTE:
        catalogue.WASTED_TOKENS.of(tier=tier, cause=cause)


def create_for_upstream(tier: str) -> None:
    """Create the series of an upstream."""
    _create_refusals("", (errors.Busy,))
    _create_refusals(tier, (errors.Overloaded,))
    for kind in (errors.NoWorkers, errors.Overloaded):
        upstream.RETRIES.of(tier=tier, error=kind.reason)
    upstream.NO_USAGE.of(tier=tier)


def create_for_worker(tier: str, model: str) -> None:
    """Create the series of a worker."""
    for outcome in ("deadline", "failed"):
        catalogue.ENDED.of(tier=tier, model=model, outcome=outcome, finish="")


def _create_refusals(tier: str, kinds: Iterable[type[errors.HeadraceError]]) -> None:
    for kind in kinds:
        catalogue.REFUSED.of(tier=tier, error=kind.reason, tenant_class="")


def _create_failovers(tier: str, kinds: Iterable[type[errors.HeadraceError]]) -> None:
    for kind in kinds:
        catalogue.FAILOVERS.of(tier=tier, error=kind.reason)
