"""Fit each tier's chance of a good answer to outcomes, of which a prompt may have one, some or all.

There are three levels, each shrunk to the one before: the base rate of a tier, a head that all tiers share,
and a tier's own correction of it. Cross-validation chooses how strongly, and prefers more strongly when the
difference is within its error, so that few outcomes give little more than base rates. The log-odds are
rescaled at the end by what cross-validation found (Platt, 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headrace.routing.learning.calibrated import Calibrated, calibrated
from headrace.routing.learning.logistic import log_loss, log_odds, logistic, probability
from headrace.routing.success.heads import Heads

Array = NDArray[np.float64]
Places = NDArray[np.int64]
Mask = NDArray[np.bool_]
Strengths = tuple[float, float]  # of the shared head and of the tiers' corrections; infinite: there are none

MIN_OUTCOMES = 5  # of each tier: with fewer, not even its base rate is known
_PARTS = 5
_NEGLIGIBLE = 1e-6  # part of the weight of the heaviest prompt
_MOST_LOG_ODDS = 6.0
_STRENGTHS = (3000.0, 1000.0, 300.0, 100.0, 30.0, 10.0)  # precisions of a standardised input, strongest first
_KINDS = 0.1  # of that for the kinds of prompt, which fewer outcomes determine
_BASE_ROWS = 4.0  # outcomes at the mean of all tiers that a tier's base rate starts with
_SPREAD = 0.02  # added to an input's standard deviation, which is too small to trust if it hardly varies
_LEVEL = 0.1  # precision of a tier's level, which is hardly shrunk
_SCALE_PRECISION = 10.0  # of the prior, around 1, of the scale of the log-odds
_TOKEN_ROWS = 20.0  # answers of a kind at which half of its mean length counts, beside the tier's


@dataclass(frozen=True, slots=True)
class Outcomes:
    """N outcomes of answers to P prompts.

    inputs    [P, F + K], as the heads read them
    prompt    [N], place of the prompt
    tier      [N], place of the tier
    good      [N], quality of the answer, 0 to 1
    weight    [N], how much each counts
    tokens    [N], length of the answer; NaN where it is not known
    """

    inputs: Array
    prompt: Places
    tier: Places
    good: Array
    weight: Array
    tokens: Array

    def only(self, chosen: Mask) -> Outcomes:
        """Return the outcomes that are *chosen* [N]."""
        return replace(
            self,
            prompt=self.prompt[chosen],
            tier=self.tier[chosen],
            good=self.good[chosen],
            weight=self.weight[chosen],
            tokens=self.tokens[chosen],
        )


@dataclass(frozen=True, slots=True)
class Fitted:
    """Fitted heads, and how well such heads estimate outcomes that they had not seen, by tier."""

    heads: Heads
    measured: tuple[Calibrated, ...]
    strengths: Strengths


def fit(tiers: Sequence[str], outcomes: Outcomes, *, kinds: int, seed: int = 0) -> Fitted:
    """Fit the heads of *tiers* to *outcomes*; the last *kinds* inputs are the kinds of prompt.

    Raises ValueError if there are too few outcomes of a tier or too few prompts, or if they do not differ.
    """
    if len(outcomes.good) and np.ptp(outcomes.good) == 0:
        raise ValueError("all outcomes are the same, so there is nothing to learn")
    counts = np.bincount(outcomes.tier, minlength=len(tiers)).tolist()
    few = [f"{tier} has {count}" for tier, count in zip(tiers, counts, strict=True) if count < MIN_OUTCOMES]
    if few:
        raise ValueError(
            f"too few outcomes to estimate the chance of success ({', '.join(few)}): each tier needs at "
            f"least {MIN_OUTCOMES}; 50 are better"
        )
    if (prompts := int(_counting(outcomes).sum())) < _PARTS:
        raise ValueError(
            f"too few prompts with outcomes that count ({prompts}): {_PARTS} are needed; 50 are better"
        )
    precision = np.ones(outcomes.inputs.shape[1])
    precision[-kinds:] = _KINDS
    parts = _parts(outcomes, seed)
    strengths, expected = _cross_validated(outcomes, len(tiers), precision, parts)
    scale, shift = _rescaling(expected, outcomes)
    weights, bias = _heads(outcomes, len(tiers), precision, strengths)
    heads = Heads(
        tiers=tuple(tiers),
        weights=scale * weights,
        bias=scale * bias + shift,
        tokens=_tokens(outcomes, len(tiers), kinds),
        rows=tuple(counts),
    )
    chance = np.zeros(len(expected))
    for part in parts:  # the scale, too, is fitted to other rows
        factor, level = _rescaling(expected[~part], outcomes.only(~part))
        chance[part] = probability(factor * expected[part] + level)
    of_tiers = (outcomes.tier == place for place in range(len(tiers)))
    measured = tuple(
        calibrated(chance[rows], outcomes.good[rows], outcomes.weight[rows]) for rows in of_tiers
    )
    return Fitted(heads, measured, strengths)


def _counting(outcomes: Outcomes) -> Mask:
    """Return which prompts have outcomes of a weight that is not negligible, [P]."""
    totals = np.bincount(outcomes.prompt, outcomes.weight, len(outcomes.inputs))
    counting: Mask = totals > _NEGLIGIBLE * totals.max()
    return counting


def _parts(outcomes: Outcomes, seed: int) -> list[Mask]:
    """Split the outcomes into masks [N] by prompt. Each has as many of the prompts that count."""
    prompts = len(outcomes.inputs)
    fold = np.zeros(prompts, dtype=np.int64)
    order = np.lexsort((np.random.default_rng(seed).permutation(prompts), ~_counting(outcomes)))
    fold[order] = np.arange(prompts) % _PARTS
    return [fold[outcomes.prompt] == part for part in range(_PARTS)]


def _cross_validated(
    outcomes: Outcomes, tiers: int, precision: Array, parts: Sequence[Mask]
) -> tuple[Strengths, Array]:
    """Choose the strengths, first of the shared head, then of the corrections.

    Returns them, and the log-odds [N] by heads that had not seen the outcome.
    """
    tried: dict[Strengths, Array] = {}

    def held_out(strengths: Strengths) -> Array:
        if strengths not in tried:
            found = tried[strengths] = np.zeros(len(outcomes.good))
            for part in parts:
                weights, bias = _heads(outcomes.only(~part), tiers, precision, strengths)
                rows = outcomes.only(part)
                inputs = (rows.inputs[rows.prompt] * weights[rows.tier]).sum(axis=1)
                found[part] = np.clip(inputs + bias[rows.tier], -_MOST_LOG_ODDS, _MOST_LOG_ODDS)
        return tried[strengths]

    def simplest(candidates: Sequence[Strengths]) -> Strengths:
        """Return the first, simplest first, that is not worse than the best by more than its error."""
        weights = outcomes.weight / outcomes.weight.sum()
        losses = {each: log_loss(held_out(each), outcomes.good) for each in candidates}
        best = min(candidates, key=lambda each: float(weights @ losses[each]))
        for each in candidates:
            worse = losses[each] - losses[best]
            mean = float(weights @ worse)
            if mean <= float(np.sqrt(weights**2 @ (worse - mean) ** 2)):
                return each
        return best

    shared, _ = simplest([(np.inf, np.inf), *((strength, np.inf) for strength in _STRENGTHS)])
    best = simplest([(shared, np.inf), *((shared, strength) for strength in _STRENGTHS)])
    return best, held_out(best)


def _heads(outcomes: Outcomes, tiers: int, precision: Array, strengths: Strengths) -> tuple[Array, Array]:
    """Return weights [T, F + K] and biases [T] at these strengths."""
    inputs, weight, good = outcomes.inputs[outcomes.prompt], outcomes.weight, outcomes.good
    count = inputs.shape[1]
    each = np.bincount(outcomes.tier, weight, tiers)
    mean_good = weight @ good / weight.sum()
    bias = log_odds(
        (np.bincount(outcomes.tier, weight * good, tiers) + _BASE_ROWS * mean_good) / (each + _BASE_ROWS)
    )
    mean = weight @ inputs / weight.sum()
    spread = np.sqrt(weight @ (inputs - mean) ** 2 / weight.sum()) + _SPREAD
    scaled = (inputs - mean) / spread
    slopes = np.zeros((tiers, count))
    shared, own = strengths
    if np.isfinite(shared):
        found = logistic(
            np.hstack([scaled, np.eye(tiers)[outcomes.tier]]),
            good,
            weights=weight,
            strengths=np.concatenate([shared * precision, np.full(tiers, _LEVEL)]),
            offset=bias[outcomes.tier],
        )
        slopes, bias = slopes + found[:count], bias + found[count:]
    if np.isfinite(own):
        for tier in range(tiers):
            rows = outcomes.tier == tier
            found = logistic(
                np.hstack([scaled[rows], np.ones((int(rows.sum()), 1))]),
                good[rows],
                weights=weight[rows],
                strengths=np.append(own * precision, _LEVEL),
                offset=scaled[rows] @ slopes[tier] + bias[tier],
            )
            slopes[tier] += found[:count]
            bias[tier] += found[count]
    weights = slopes / spread
    return weights, bias - weights @ mean


def _rescaling(expected: Array, outcomes: Outcomes) -> tuple[float, float]:
    """Return the factor and the summand with which the log-odds *expected* [N] fit the outcomes best."""
    centre = float(outcomes.weight @ expected / outcomes.weight.sum())
    found = logistic(
        np.column_stack([expected - centre, np.ones(len(expected))]),
        outcomes.good,
        weights=outcomes.weight,
        strengths=np.array([_SCALE_PRECISION, _LEVEL]),
        offset=expected,
    )
    scale = float(np.clip(1 + found[0], 0.25, 4.0))
    return scale, float(found[1]) - (scale - 1) * centre


def _tokens(outcomes: Outcomes, tiers: int, kinds: int) -> Array:
    """Return the mean length [T, K] of a tier's answers by kind, shrunk to the mean of all its answers."""
    found = np.full((tiers, kinds), np.nan)
    shares = outcomes.inputs[outcomes.prompt, -kinds:]
    for tier in range(tiers):
        rows = (outcomes.tier == tier) & ~np.isnan(outcomes.tokens)
        if rows.any():
            tokens, weight = outcomes.tokens[rows], outcomes.weight[rows]
            each = shares[rows] * weight[:, None]
            mean = weight @ tokens / weight.sum()
            found[tier] = (tokens @ each + _TOKEN_ROWS * mean) / (each.sum(axis=0) + _TOKEN_ROWS)
    return found
