"""Read what a tier's peers report about themselves, and combine the reports. Pure functions.

A peer is a batcher, or another router with any number of tiers. Reports are validated here, so that a peer
that violates the contract becomes unhealthy and never harms the router.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.v1 import routing_service_pb2 as routing
from headrace.validation import MAX_NAME

_MAX_COUNT = 2**32 - 1
_MAX_NANOSECONDS = 10**18  # three decades
_MAX_FIGURE = 10**15  # of what a peer has counted
_MAX_REASON = 500  # characters of a peer's reason for being unhealthy


class BadReply(Exception):
    """A reply violates the contract. The message is for people."""


@dataclass(frozen=True, slots=True)
class PeerReport:
    """What a peer reports about itself.

    tier     its health, limits and load; for a router, of all its tiers together
    models   the models that it serves
    router   whether it is a router
    """

    tier: routing.Tier
    models: frozenset[str]
    router: bool


def read_tiers(listed: routing.ListTiersResponse) -> PeerReport:
    """Read a peer's reply to ListTiers. Raises BadReply."""
    router = listed.HasField("bill")  # a batcher has none
    if not listed.tiers:
        raise BadReply("its ListTiers reply names no tier")
    if len(listed.tiers) > 1 and not router:
        raise BadReply(f"its ListTiers reply names {len(listed.tiers)} tiers, a batcher serves one")
    tiers = [_checked(tier) for tier in listed.tiers]
    serving = [tier for tier in tiers if tier.healthy] or tiers
    models = frozenset(tier.model for tier in serving if tier.model)
    return PeerReport(_router_as_tier(tiers) if router else tiers[0], models, router)


def _checked(tier: routing.Tier) -> routing.Tier:
    for field in ("name", "model"):
        if len(value := getattr(tier, field)) > MAX_NAME:
            raise BadReply(f"its ListTiers reply has a {field} of {len(value)} characters")
    checked = routing.Tier()
    checked.CopyFrom(tier)
    checked.unhealthy_reason = tier.unhealthy_reason[:_MAX_REASON]
    rate = tier.load.tokens_per_second
    if not (math.isfinite(rate) and rate >= 0):
        checked.load.tokens_per_second = 0.0
    if tier.load.HasField("oldest_wait") and not plausible(tier.load.oldest_wait.ToNanoseconds()):
        checked.load.ClearField("oldest_wait")
    checked.ClearField("figures")
    figures = tier.figures
    if all(0 <= value <= _MAX_FIGURE for value in (figures.failovers, figures.batches, figures.batch_fill)):
        # The router measures times itself.
        checked.figures.failovers, checked.figures.batches = figures.failovers, figures.batches
        checked.figures.batch_fill = figures.batch_fill
    return checked


def _router_as_tier(tiers: Sequence[routing.Tier]) -> routing.Tier:
    """Return a router's tiers as one tier. The router may use any of them, so limits are the maximum."""
    serving = [tier for tier in tiers if tier.healthy] or tiers
    models = dict.fromkeys(tier.model for tier in serving if tier.model)
    one = routing.Tier(
        model=", ".join(models)[:MAX_NAME],
        healthy=any(tier.healthy for tier in tiers),
        unhealthy_reason="; ".join(tier.unhealthy_reason for tier in tiers if tier.unhealthy_reason),
        limits=routing.TierLimits(
            context_length=max(tier.limits.context_length for tier in serving),
            max_tokens=max(tier.limits.max_tokens for tier in serving),
            queue_limit=total(tier.limits.queue_limit for tier in serving),
            max_running=total(tier.limits.max_running for tier in serving),
        ),
        load=routing.TierLoad(
            queued=total(tier.load.queued for tier in serving),
            running=total(tier.load.running for tier in serving),
            workers=total(tier.load.workers for tier in serving),
            tokens_per_second=sum(tier.load.tokens_per_second for tier in serving),
        ),
    )
    one.load.oldest_wait.CopyFrom(
        max((tier.load.oldest_wait for tier in serving), key=lambda wait: wait.ToNanoseconds())
    )
    if one.healthy:
        one.unhealthy_reason = ""
    return one


def combined(name: str, reports: Sequence[routing.Tier]) -> routing.Tier:
    """Return the reports of a tier's batchers as one.

    The batchers share the workers, so `workers` and `max_running` are the maximum of the reports. Queued,
    running and generated tokens are each batcher's own, so they are sums.
    """
    healthy = [one for one in reports if one.healthy]
    tier = routing.Tier(
        name=name,
        model=next((one.model for one in [*healthy, *reports] if one.model), ""),
        healthy=bool(healthy),
        unhealthy_reason=""
        if healthy
        else "; ".join(one.unhealthy_reason for one in reports) or "its targets have no address",
    )
    for one in healthy or reports:
        limits, load = one.limits, one.load
        tier.limits.context_length = (
            min(tier.limits.context_length, limits.context_length)
            if tier.limits.context_length
            else limits.context_length
        )
        tier.limits.max_tokens = max(tier.limits.max_tokens, limits.max_tokens)
        tier.limits.queue_limit = total([tier.limits.queue_limit, limits.queue_limit])
        tier.limits.max_running = max(tier.limits.max_running, limits.max_running)
        tier.load.queued = total([tier.load.queued, load.queued])
        tier.load.running = total([tier.load.running, load.running])
        tier.load.workers = max(tier.load.workers, load.workers)
        tier.load.tokens_per_second += load.tokens_per_second
        if load.oldest_wait.ToNanoseconds() > tier.load.oldest_wait.ToNanoseconds():
            tier.load.oldest_wait.CopyFrom(load.oldest_wait)
    for one in reports:
        tier.figures.failovers += one.figures.failovers
        tier.figures.batches += one.figures.batches
        tier.figures.batch_fill += one.figures.batch_fill
    return tier


def total(counts: Iterable[int]) -> int:
    """Return the sum, at most the largest uint32."""
    return min(sum(counts), _MAX_COUNT)


def plausible(nanoseconds: int) -> bool:
    """Whether a duration that a peer reports can be right."""
    return 0 <= nanoseconds <= _MAX_NANOSECONDS
