"""Read the details of tokens that workers send: log-probabilities, and the most likely tokens at each place.

A worker that sends details of the wrong shape violates the contract. Log-probabilities that are not finite
come from the model, and fail only their own sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire

# Tokens in one event, with the most likely ones at each place: about 20 KiB with their texts, so that the
# events that are sent ahead of a reader take little memory, and making one takes little time.
MAX_ENTRIES = 1024
_MOST = 0.01  # rounding may bring a log-probability above 0


class TokenScores(NamedTuple):
    """The log-probability of a token, and the most likely tokens at its place, most likely first."""

    logprob: float
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


# What is known of a token besides its id: `TokenScores` if the request has top_logprobs above 0.
Score: TypeAlias = float | TokenScores


def tokens_per_event(top: int) -> int:
    """Return the most tokens of one event if each has the *top* most likely tokens at its place."""
    return max(MAX_ENTRIES // (1 + top), 1)


def needed_features(sampling: pb.Sampling, grammar: str = "") -> dict[str, str]:
    """Return the optional features of an engine that a request needs, and the field that asks for each.

    grammar   the field because of which the answer has a grammar; empty: it has none
    """
    needed = {}
    if grammar:
        needed["structured"] = grammar
    if sampling.HasField("top_logprobs"):
        needed["top_logprobs"] = "sampling.top_logprobs"
    if sampling.HasField("prompt_logprobs"):
        needed["prompt_logprobs"] = "sampling.prompt_logprobs"
    return needed


def scores_of(delta: wire.SequenceDelta, skip: int) -> list[Score]:
    """Return the scores of the tokens of *delta* after the first *skip*.

    Raises WorkerLost unless each log-probability has its most likely tokens.
    """
    if len(delta.top) != len(delta.logprobs):
        raise errors.WorkerLost(
            f"the worker sent the most likely tokens at {len(delta.top)} places for {len(delta.logprobs)} "
            "log-probabilities"
        )
    return [
        # Lists: a part of the message would keep all of it in memory.
        TokenScores(logprob, top.ids[:], top.logprobs[:])
        for logprob, top in zip(delta.logprobs[skip:], delta.top[skip:], strict=True)
    ]


def check_scores(scores: Sequence[Score], *, most: int, vocabulary: int) -> None:
    """Check the scores of tokens, at least one.

    most         most likely tokens at each place
    vocabulary   the size of the worker's; 0 while unknown

    Raises WorkerLost, or SequenceFault for a log-probability that is not finite or above 0.
    """
    own = [score.logprob if isinstance(score, TokenScores) else score for score in scores]
    _check_values(own)
    for score in scores if most else ():
        if isinstance(score, TokenScores):
            _check_top(score.top_ids, score.top_logprobs, most, vocabulary)


def prompt_parts(
    message: wire.PromptLogprobs, at: int, *, prompt_tokens: int, most: int, vocabulary: int
) -> Iterator[wire.PromptLogprobs]:
    """Yield the new tokens of a part of a prompt, at most `tokens_per_event` at a time, as copies.

    at            the position of the first new token; the tokens before it are known
    prompt_tokens of the whole prompt

    The other arguments and the errors are those of `check_scores`.
    """
    count, skip = len(message.logprobs), at - message.offset
    if skip < 0 or message.offset < 1:
        raise errors.WorkerLost(f"the worker sent prompt token {message.offset}, expected {at}")
    if message.offset + count > prompt_tokens:
        raise errors.WorkerLost(
            f"the worker sent log-probabilities up to prompt token {message.offset + count}, but the prompt "
            f"has {prompt_tokens}"
        )
    if len(message.top) != (count if most else 0):
        raise errors.WorkerLost(
            f"the worker sent the most likely tokens at {len(message.top)} places for {count} prompt tokens"
        )
    for first in range(skip, count, size := tokens_per_event(most)):
        part = wire.PromptLogprobs(offset=message.offset + first)
        part.logprobs.extend(message.logprobs[first : first + size])
        _check_values(part.logprobs)
        for top in message.top[first : first + size]:
            _check_top(top.ids, top.logprobs, most, vocabulary)
            part.top.append(top)
        yield part


def _check_top(ids: Sequence[int], logprobs: Sequence[float], most: int, vocabulary: int) -> None:
    if not 0 < len(ids) <= most or len(logprobs) != len(ids):
        raise errors.WorkerLost(
            f"the worker sent {len(ids)} most likely tokens with {len(logprobs)} log-probabilities, at most "
            f"{most} are requested"
        )
    if vocabulary and max(ids) >= vocabulary:
        raise errors.WorkerLost(f"the worker sent token {max(ids)}, but its vocabulary has {vocabulary}")
    _check_values(logprobs)


def _check_values(logprobs: Sequence[float]) -> None:
    # The sum is NaN or minus infinity if one of the numbers is; JSON can represent neither.
    if not (-math.inf < sum(logprobs) and max(logprobs) <= _MOST):
        raise errors.SequenceFault(
            "the engine computed a log-probability that is not a finite number, or is above 0"
        )
