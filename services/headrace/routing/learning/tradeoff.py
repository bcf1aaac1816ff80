"""Measure how well a score routes between two tiers: quality against the share of strong calls.

These are the metrics of RouteLLM (Ong et al., arXiv 2406.18665): sort prompts by score, send the top share
to the strong tier, and measure how much of the gap between always-weak and always-strong is recovered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a score routes. A random score has 0.5, 50 and 80.

    apgr    average performance gap recovered, over shares of strong calls from 0 to 100 %
    cpt50   smallest share of strong calls, in %, that recovers half of the gap
    cpt80   the same for four fifths
    """

    apgr: float
    cpt50: float
    cpt80: float


def recovered(
    scores: ArrayLike, weak: ArrayLike, strong: ArrayLike, weights: ArrayLike | None = None
) -> tuple[Array, Array]:
    """Return the share of strong calls, 0 to 100 %, and the gap recovered at each share; both [rows + 1].

    weights   [rows], how many calls each stands for; all 1 if None

    Prompts of equal score are in random order, so each counts as their mean. Raises ValueError if the strong
    tier is no better than the weak one, so that there is no gap to recover.
    """
    values = np.asarray(scores, dtype=np.float64)
    gains = np.asarray(strong, dtype=np.float64) - np.asarray(weak, dtype=np.float64)
    calls = np.ones(len(gains)) if weights is None else np.asarray(weights, dtype=np.float64)
    total = float(calls @ gains)
    if total <= 0:
        raise ValueError("the strong tier is no better than the weak one on these rows")
    _, group = np.unique(-values, return_inverse=True)
    means = np.bincount(group, calls * gains) / np.bincount(group, calls)
    order = np.argsort(group, kind="stable")
    gap = np.concatenate([[0.0], np.cumsum(calls[order] * means[group[order]])]) / total
    share = np.concatenate([[0.0], np.cumsum(calls[order])]) / calls.sum()
    return 100.0 * share, gap


def quality(
    scores: ArrayLike, weak: ArrayLike, strong: ArrayLike, weights: ArrayLike | None = None
) -> Quality:
    """Return the figures for *scores* [rows] and each tier's outcomes [rows], 0 to 1; see `recovered`."""
    share, gap = recovered(scores, weak, strong, weights)
    apgr = float(np.interp(np.linspace(0, 100, 101), share, gap).mean())
    return Quality(apgr, _first(share, gap, 0.5), _first(share, gap, 0.8))


def _first(share: Array, gap: Array, wanted: float) -> float:
    """Return the share at which the interpolated curve first reaches *wanted*."""
    place = int(np.argmax(gap >= wanted))
    low, high = gap[place - 1], gap[place]
    part = (wanted - low) / (high - low)
    return float(share[place - 1] + part * (share[place] - share[place - 1]))


def folds(count: int, parts: int, seed: int) -> list[Sequence[int]]:
    """Split *count* rows at random into *parts* folds of about the same size."""

    order = np.random.default_rng(seed).permutation(count)
    return [order[part::parts].tolist() for part in range(parts)]
