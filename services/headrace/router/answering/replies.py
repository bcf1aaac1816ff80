"""Validate the events of a peer's answer where they arrive. Pure functions.

A peer is a batcher, or another router. An event that violates the contract makes its stream lost, and never
harms the router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from headrace import errors
from headrace.checks.conversations import MAX_CALL_ID
from headrace.router.state.peer_reports import plausible
from headrace.v1 import generation_pb2 as pb
from headrace.validation import MAX_ATTEMPT, MAX_NAME, MAX_STOP_CHARACTERS

MAX_TOOL_NAME = 64  # characters
MAX_TOKENS = 2**31  # of one count that a peer reports; the sum of two still fits a uint32

_MOST_LOGPROB = 0.01  # rounding may bring a log-probability above 0
_BAD_LOGPROB = "the batcher sent a log-probability that is not a finite number, or is above 0"

# Reasons that never end a caller's answer. Numbers that this version does not know are a newer peer's.
_NOT_FINAL = frozenset([pb.FINISH_REASON_UNSPECIFIED, pb.FINISH_REASON_CANCELLED, pb.FINISH_REASON_DEADLINE])


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


def check_delta(delta: pb.Delta, had: int, max_tokens: float) -> None:
    """Raise BatcherLost if the delta does not match the request.

    had          tokens of the answer before it
    max_tokens   that the request allows; infinite if it does not say
    """
    count, logprobs = delta.token_count, delta.logprobs
    if logprobs:
        if len(logprobs) != count:
            raise errors.BatcherLost(f"the batcher sent {len(logprobs)} log-probabilities for {count} tokens")
        _check_logprobs(logprobs)
    if count and had + count > max_tokens:
        raise errors.BatcherLost(f"the batcher sent {had + count} tokens, the request allows {max_tokens}")


def check_text(delta: pb.Delta, had: int, most: int | None) -> None:
    """Raise BatcherLost if the delta of an answer of text alone is implausible.

    had    tokens of the answer before it, as estimated
    most   most likely tokens at each place; None if they were not requested

    The tokens are estimates: they may exceed `max_tokens`, and need not be as many as those with
    log-probabilities, which the service outside reports or leaves out.
    """
    _check_logprobs(delta.logprobs)
    if had + delta.token_count > MAX_TOKENS:
        raise errors.BatcherLost(f"the batcher sent a text of {had + delta.token_count} tokens")
    if most is not None:
        _check_details(delta.tokens, most)


def _check_logprobs(logprobs: Sequence[float]) -> None:
    if logprobs and not (-math.inf < sum(logprobs) and max(logprobs) <= _MOST_LOGPROB):
        raise errors.BatcherLost(_BAD_LOGPROB)


def check_calls(delta: pb.Delta, begun: int | None) -> int | None:
    """Raise BatcherLost unless the parts of calls in a delta continue those before it.

    begun   calls of the answer before it; None if that is not known, since the answer was resumed

    Returns the calls begun with it.
    """
    for part in delta.tool_calls:
        if part.id:
            if not part.name or len(part.id) > MAX_CALL_ID or len(part.name) > MAX_TOOL_NAME:
                raise errors.BatcherLost(
                    f"the batcher sent a call with a name of {len(part.name)} and an id of {len(part.id)} "
                    "characters"
                )
            expected = part.index if begun is None else begun
        else:
            expected = part.index if begun is None else begun - 1
        if part.index != expected or (part.name and not part.id):
            raise errors.BatcherLost(
                f"the batcher sent a part of call {part.index} that does not follow the parts before it"
            )
        begun = part.index + 1
    return begun


def check_tokens(delta: pb.Delta, most: int) -> None:
    """Check the details of a delta's tokens, which the request asks for.

    most   most likely tokens at each place

    Raises InvalidSampling if there are none, and BatcherLost if they are implausible.
    """
    described, count = len(delta.tokens), delta.token_count
    if described != count:
        if not described:
            raise unsupported("top_logprobs")
        raise errors.BatcherLost(f"the batcher sent details of {described} of {count} tokens")
    _check_details(delta.tokens, most)


def unsupported(feature: str) -> errors.InvalidSampling:
    """Return the error for a batcher that ignores a field: it is of an older version."""
    return errors.InvalidSampling(
        f"the batcher of this tier does not support sampling.{feature}: upgrade it, or leave the field out",
        field=f"sampling.{feature}",
    )


def _check_details(tokens: Sequence[pb.TokenLogprobs], most: int) -> None:
    for described in tokens:
        top = described.top
        if len(top) > most:
            raise errors.BatcherLost(
                f"the batcher sent {len(top)} most likely tokens, the request asks for {most}"
            )
        # False for NaN and infinities, which JSON cannot represent.
        if not all(-math.inf < one.logprob <= _MOST_LOGPROB for one in (described.token, *top)):
            raise errors.BatcherLost(_BAD_LOGPROB)


def check_prompt(part: pb.PromptTokens, prompt_tokens: int, most: int) -> None:
    """Raise BatcherLost if a part of a prompt is implausible.

    prompt_tokens   of the whole prompt
    most            most likely tokens at each place
    """
    end = part.offset + len(part.tokens)
    if end > prompt_tokens:
        raise errors.BatcherLost(f"the batcher sent prompt token {end - 1}, the prompt has {prompt_tokens}")
    _check_details(part.tokens, most)


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


def check_finish(finish: pb.Finish, tokens: int, *, estimated: bool = False) -> None:
    """Limit the numbers of `finish` to plausible values. Raises BatcherLost if its reason is not final.

    tokens      of the answer, as counted by the router
    estimated   whether they are an estimate, which counts only if the batcher reports no number
    """
    if finish.reason in _NOT_FINAL:
        raise errors.BatcherLost(f"the batcher ended the answer with {pb.FinishReason.Name(finish.reason)}")
    if len(finish.stop_sequence) > MAX_STOP_CHARACTERS:
        finish.ClearField("stop_sequence")
    usage, timing = finish.usage, finish.timing
    reported = min(usage.completion_tokens, MAX_TOKENS) if estimated else 0
    usage.completion_tokens = reported or tokens
    usage.prompt_tokens = min(usage.prompt_tokens, MAX_TOKENS)
    usage.cached_tokens = min(usage.cached_tokens, usage.prompt_tokens)
    usage.wasted_tokens = min(usage.wasted_tokens, MAX_TOKENS)
    usage.replayed_tokens = min(usage.replayed_tokens, MAX_TOKENS)
    for field, value in timing.ListFields():
        if not plausible(value.ToNanoseconds()):
            timing.ClearField(field.name)  # type: ignore[arg-type] # a name of its own descriptor


def repeated_prompt_tokens(finish: pb.Finish, prompt_tokens: int) -> int:
    """Return the prompt tokens that a router behind this one processed again, for its drafts and samples.

    prompt_tokens   of the answer, as billed here
    """
    if not finish.HasField("bill"):
        return 0
    processed = sum(charge.prompt_tokens for charge in finish.bill.charges)
    return max(min(processed, MAX_TOKENS) - prompt_tokens, 0)
