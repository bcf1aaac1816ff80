"""Check what a tier's peer replies, where it arrives: nothing else of the router sees it unchecked.

A peer is a batcher, or a router of its own with any number of tiers. What does not keep the contract makes
the peer unhealthy, or its stream a lost one; it never harms the router. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from headrace.validation import MAX_ATTEMPT, MAX_NAME, MAX_STOP_CHARACTERS

MOST_TOKENS = 2**31  # of one count that a peer reports; two of them still fit a uint32
_MOST_COUNT = 2**32 - 1
_MOST_NANOSECONDS = 10**18  # three decades
_MOST_REASON = 500  # characters of what a peer says of its health

# Reasons that may end a caller's answer. Numbers that this version does not know are a newer peer's.
_NO_ENDS = frozenset([pb.FINISH_REASON_UNSPECIFIED, pb.FINISH_REASON_CANCELLED, pb.FINISH_REASON_DEADLINE])


class BadReply(Exception):
    """A reply does not keep the contract. The message says how, for people."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A peer as it describes itself.

    tier     what it can take and how it is; for a router, all of its tiers together
    models   that it answers with
    router   whether it is a router, which has tiers of its own
    """

    tier: routing.Tier
    models: frozenset[str]
    router: bool


def read_tiers(listed: routing.ListTiersResponse) -> Seen:
    """What a peer's answer to ListTiers says. Raises BadReply."""
    router = listed.HasField("bill")  # a batcher has none
    if not listed.tiers:
        raise BadReply("its ListTiers answer names no tier")
    if len(listed.tiers) > 1 and not router:
        raise BadReply(f"its ListTiers answer names {len(listed.tiers)} tiers, a batcher serves one")
    tiers = [_checked(tier) for tier in listed.tiers]
    serving = [tier for tier in tiers if tier.healthy] or tiers
    models = frozenset(tier.model for tier in serving if tier.model)
    return Seen(_together(tiers) if router else tiers[0], models, router)


def _checked(tier: routing.Tier) -> routing.Tier:
    for field in ("name", "model"):
        if len(value := getattr(tier, field)) > MAX_NAME:
            raise BadReply(f"its ListTiers answer has a {field} of {len(value)} characters")
    checked = routing.Tier()
    checked.CopyFrom(tier)
    checked.unhealthy_reason = tier.unhealthy_reason[:_MOST_REASON]
    rate = tier.load.tokens_per_second
    if not (math.isfinite(rate) and rate >= 0):
        checked.load.tokens_per_second = 0.0
    if tier.load.HasField("oldest_wait") and not _plausible(tier.load.oldest_wait.ToNanoseconds()):
        checked.load.ClearField("oldest_wait")
    return checked


def _together(tiers: Sequence[routing.Tier]) -> routing.Tier:
    """A router's tiers as one: it may use any of them, so limits are the widest."""
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
    """The sum, as far as it fits a uint32."""
    return min(sum(counts), _MOST_COUNT)


def accept(accepted: pb.Accepted, request: pb.GenerateRequest, tier: str) -> None:
    """Bring `accepted` into the router's own terms: its request, its seed, its name for the *tier*.

    Raises BatcherLost for a model's name that cannot be one.
    """
    if len(accepted.model) > MAX_NAME:
        raise errors.BatcherLost(f"the batcher named a model of {len(accepted.model)} characters")
    accepted.request_id = request.request_id
    accepted.seed = request.sampling.seed
    accepted.tier = tier
    accepted.ClearField("score")
    accepted.prompt_tokens = min(accepted.prompt_tokens, MOST_TOKENS)


def check_delta(delta: pb.Delta, had: int, request: pb.GenerateRequest) -> None:
    """Raise BatcherLost for a delta that is not what *request* asked for.

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
            f"the batcher sent {had + delta.token_count} tokens of at most {sampling.max_tokens}"
        )


def check_change(change: pb.RouteChange, within: str) -> None:
    """Bring a move inside of a peer into the router's own terms. Raises BatcherLost.

    within   the tier whose router moved the answer, to tell its places from ours; empty at a batcher
    """
    places = [getattr(change, "from"), change.to]
    if change.attempt > MAX_ATTEMPT or any(len(place) > MAX_NAME for place in places):
        raise errors.BatcherLost(f"the batcher sent a move that cannot be, to attempt {change.attempt}")
    if within:
        change.to = f"{within}/{change.to}"
        setattr(change, "from", f"{within}/{places[0]}")  # a keyword of Python's


def check_finish(finish: pb.Finish, tokens: int) -> None:
    """Mend the figures of `finish`, so that they can be added up. Raises BatcherLost for an end that is none.

    tokens   of the answer, counted here
    """
    if finish.reason in _NO_ENDS:
        raise errors.BatcherLost(f"the batcher ended the answer with {pb.FinishReason.Name(finish.reason)}")
    if len(finish.stop_sequence) > MAX_STOP_CHARACTERS:
        finish.ClearField("stop_sequence")
    usage, timing = finish.usage, finish.timing
    usage.completion_tokens = tokens
    usage.prompt_tokens = min(usage.prompt_tokens, MOST_TOKENS)
    usage.cached_tokens = min(usage.cached_tokens, usage.prompt_tokens)
    usage.wasted_tokens = min(usage.wasted_tokens, MOST_TOKENS)
    usage.replayed_tokens = min(usage.replayed_tokens, MOST_TOKENS)
    for field, value in timing.ListFields():
        if not _plausible(value.ToNanoseconds()):
            timing.ClearField(field.name)  # type: ignore[arg-type] # a name of its own descriptor


def more_prompt_tokens(finish: pb.Finish) -> int:
    """Tokens of prompt that a router behind us had read more than once, for drafts and samples of its own."""
    read = sum(charge.prompt_tokens for charge in finish.bill.charges)
    return max(min(read, MOST_TOKENS) - finish.usage.prompt_tokens, 0)


def _plausible(nanoseconds: int) -> bool:
    return 0 <= nanoseconds <= _MOST_NANOSECONDS
