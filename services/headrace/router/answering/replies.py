"""Validate the replies of a tier's peers where they arrive. Pure functions.

A peer is a batcher, or another router with any number of tiers. A reply that violates the contract makes the
peer unhealthy or its stream lost, and never harms the router.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from headrace.validation import MAX_ATTEMPT, MAX_NAME, MAX_STOP_CHARACTERS

MAX_TOKENS = 2**31  # of one count that a peer reports; the sum of two still fits a uint32
_MAX_COUNT = 2**32 - 1
_MAX_NANOSECONDS = 10**18  # three decades
_MAX_REASON = 500  # characters of a peer's reason for being unhealthy

# Reasons that never end a caller's answer. Numbers that this version does not know are a newer peer's.
_NOT_FINAL = frozenset([pb.FINISH_REASON_UNSPECIFIED, pb.FINISH_REASON_CANCELLED, pb.FINISH_REASON_DEADLINE])


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
    if tier.load.HasField("oldest_wait") and not _plausible(tier.load.oldest_wait.ToNanoseconds()):
        checked.load.ClearField("oldest_wait")
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


def total(counts: Iterable[int]) -> int:
    """Return the sum, at most the largest uint32."""
    return min(sum(counts), _MAX_COUNT)


def accept(accepted: pb.Accepted, request: pb.GenerateRequest, tier: str) -> None:
    """Replace request id, seed and tier in `accepted` by the router's own.

    Raises BatcherLost if the name of the model is too long.
    """
    if len(accepted.model) > MAX_NAME:
        raise errors.BatcherLost(f"the batcher sent a model name of {len(accepted.model)} characters")
    accepted.request_id = request.request_id
    accepted.seed = request.sampling.seed
    accepted.tier = tier
    accepted.ClearField("score")
    accepted.prompt_tokens = min(accepted.prompt_tokens, MAX_TOKENS)


def check_delta(delta: pb.Delta, had: int, request: pb.GenerateRequest) -> None:
    """Raise BatcherLost if the delta does not match *request*.

    had   tokens of the answer before it
    """
    if len(delta.logprobs) not in (0, delta.token_count):
        raise errors.BatcherLost(
            f"the batcher sent {len(delta.logprobs)} log-probabilities for {delta.token_count} tokens"
        )
    sampling = request.sampling
    if (
        delta.token_count
        and sampling.HasField("max_tokens")
        and had + delta.token_count > sampling.max_tokens
    ):
        raise errors.BatcherLost(
            f"the batcher sent {had + delta.token_count} tokens, the request allows {sampling.max_tokens}"
        )


def check_change(change: pb.RouteChange, within: str) -> None:
    """Check a `route_change` of a peer, and prefix the names of its tiers. Raises BatcherLost.

    within   the tier whose router changed the route, as the prefix; empty if the peer is a batcher
    """
    places = [getattr(change, "from"), change.to]
    if change.attempt > MAX_ATTEMPT or any(len(place) > MAX_NAME for place in places):
        raise errors.BatcherLost(f"the batcher sent an invalid route_change, to attempt {change.attempt}")
    if within:
        change.to = f"{within}/{change.to}"
        setattr(change, "from", f"{within}/{places[0]}")  # a keyword of Python's


def check_finish(finish: pb.Finish, tokens: int) -> None:
    """Limit the numbers of `finish` to plausible values. Raises BatcherLost if its reason is not final.

    tokens   of the answer, as counted by the router
    """
    if finish.reason in _NOT_FINAL:
        raise errors.BatcherLost(f"the batcher ended the answer with {pb.FinishReason.Name(finish.reason)}")
    if len(finish.stop_sequence) > MAX_STOP_CHARACTERS:
        finish.ClearField("stop_sequence")
    usage, timing = finish.usage, finish.timing
    usage.completion_tokens = tokens
    usage.prompt_tokens = min(usage.prompt_tokens, MAX_TOKENS)
    usage.cached_tokens = min(usage.cached_tokens, usage.prompt_tokens)
    usage.wasted_tokens = min(usage.wasted_tokens, MAX_TOKENS)
    usage.replayed_tokens = min(usage.replayed_tokens, MAX_TOKENS)
    for field, value in timing.ListFields():
        if not _plausible(value.ToNanoseconds()):
            timing.ClearField(field.name)  # type: ignore[arg-type] # a name of its own descriptor


def repeated_prompt_tokens(finish: pb.Finish) -> int:
    """Return the prompt tokens that a router behind this one processed again, for its drafts and samples."""
    processed = sum(charge.prompt_tokens for charge in finish.bill.charges)
    return max(min(processed, MAX_TOKENS) - finish.usage.prompt_tokens, 0)


def _plausible(nanoseconds: int) -> bool:
    return 0 <= nanoseconds <= _MAX_NANOSECONDS
