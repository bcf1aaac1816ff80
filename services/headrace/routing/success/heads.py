"""Estimate how likely each tier is to answer a prompt well, and how many tokens its answer will have.

There is one logistic head per tier on the inputs of the scorer: the features of the text and the
probabilities of its kinds. `learning/success.py` fits the heads. The scorer's file holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.routing.success.estimate import Estimate

Array = NDArray[np.float64]

_MOST_LOG_ODDS = 6.0  # no estimate is surer than 0.25 % or 99.75 %


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of T tiers on F features and K kinds.

    tiers     names
    weights   [T, F + K], log-odds per unit of an input: first the features, then the kinds
    bias      [T]
    tokens    [T, K], expected tokens of an answer by kind; NaN for a tier without known lengths
    rows      [T], number of outcomes that each was fitted to
    """

    tiers: tuple[str, ...]
    weights: Array
    bias: Array
    tokens: Array
    rows: tuple[int, ...]

    def log_odds(self, inputs: Array) -> Array:
        """Return the log-odds of a good answer, [..., T], for *inputs* [..., F + K]."""
        found: Array = np.clip(inputs @ self.weights.T + self.bias, -_MOST_LOG_ODDS, _MOST_LOG_ODDS)
        return found

    def good(self, inputs: Array) -> Array:
        """Return the probability of a good answer, [..., T], for *inputs* [..., F + K]."""
        found: Array = 1 / (1 + np.exp(-self.log_odds(inputs)))
        return found

    def estimates(self, features: Array, kinds: Array) -> dict[str, Estimate]:
        """Return the estimates of each tier for one prompt's *features* [F] and *kinds* [K]."""
        good = self.good(np.concatenate([features, kinds])).tolist()
        tokens = (self.tokens @ kinds).tolist()
        return {
            tier: Estimate(chance, length if length == length else None)  # NaN is not equal to itself
            for tier, chance, length in zip(self.tiers, good, tokens, strict=True)
        }


def dump(heads: Heads) -> dict[str, Any]:
    """Return *heads* as the value of a JSON field."""
    return {
        tier: {
            "rows": heads.rows[place],
            "bias": round(float(heads.bias[place]), 5),
            "head": [round(float(value), 5) for value in heads.weights[place]],
            "tokens": _known(heads.tokens[place]),
        }
        for place, tier in enumerate(heads.tiers)
    }


def parse(content: Any, *, features: int, kinds: int) -> Heads:
    """Return the heads that `dump` wrote, for that many features and kinds.

    Raises ValueError, KeyError, TypeError or OverflowError.
    """
    if not isinstance(content, Mapping) or not content:
        raise ValueError("its 'tiers' are not an object with an entry per tier")
    parts = list(content.values())
    unknown = [float("nan")] * kinds
    heads = Heads(
        tiers=tuple(content),
        weights=np.array([part["head"] for part in parts], dtype=np.float64),
        bias=np.array([part["bias"] for part in parts], dtype=np.float64),
        tokens=np.array([part["tokens"] or unknown for part in parts], dtype=np.float64),
        rows=tuple(int(part["rows"]) for part in parts),
    )
    if (
        heads.weights.shape != (len(parts), features + kinds)
        or heads.bias.shape != (len(parts),)
        or heads.tokens.shape != (len(parts), kinds)
    ):
        raise ValueError("the weights of its tiers have the wrong number of values")
    if not (np.isfinite(heads.weights).all() and np.isfinite(heads.bias).all()):
        raise ValueError("the weights of its tiers are not all finite")
    if (heads.tokens < 0).any() or np.isinf(heads.tokens).any():
        raise ValueError("the tokens of its tiers are not all 0 or more")
    return heads


def _known(tokens: Array) -> list[float]:
    return [] if np.isnan(tokens).any() else [round(float(value), 1) for value in tokens]
