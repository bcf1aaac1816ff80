"""Translate vLLM's log-probabilities. Without vLLM itself.

vLLM computes them before temperature, filters and processors (`logprobs_mode` "raw_logprobs", its default),
which is what the contract promises. It puts the token itself first, then the most likely ones; a token that is
one of them is there twice, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from headrace.worker.runner import PromptLogprobs, TopTokens

# Instead of minus infinity, which JSON cannot represent.
LEAST = float(np.finfo(np.float32).min)


class FlatLogprobs(Protocol):
    """vLLM's class of this name: those of place p are at start_indices[p] to end_indices[p] - 1."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


def answer_logprobs(
    found: FlatLogprobs | None, tokens: int, *, top: int
) -> tuple[list[float], list[TopTokens]]:
    """Return the log-probabilities of tokens of an answer, and the most likely tokens at their places.

    found    of at least *tokens* places; None if the sequence asks for none
    tokens   number of tokens that are delivered
    top      how many of the most likely tokens the sequence asks for; the second list is empty if 0
    """
    if found is None:
        return [], []
    return _places(found, 0, tokens, top)


def prompt_logprobs(found: FlatLogprobs | None, *, top: int) -> PromptLogprobs | None:
    """Return the log-probabilities of a prompt's tokens, without the first, which has none.

    found   of all places of the prompt; None or empty if there is nothing new
    """
    if not found or len(found.start_indices) < 2:
        return None
    return PromptLogprobs(1, *_places(found, 1, len(found.start_indices), top))


def _places(found: FlatLogprobs, begin: int, end: int, top: int) -> tuple[list[float], list[TopTokens]]:
    starts = found.start_indices[begin:end]
    own = [_finite(found.logprobs[start]) for start in starts]
    tops = [_top(found, start + 1, start + 1 + top) for start in starts] if top else []
    return own, tops


def _top(found: FlatLogprobs, begin: int, end: int) -> TopTokens:
    logprobs: Sequence[float] = [_finite(logprob) for logprob in found.logprobs[begin:end]]
    return TopTokens(found.token_ids[begin:end], logprobs)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
