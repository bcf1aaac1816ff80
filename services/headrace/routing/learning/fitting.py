"""Fit the scorer's model: the gate between kinds of prompt, one head per kind, and a refit on new outcomes.

It uses ridge regression for the heads and softmax regression for the gate, on the features of
`prompt_features.py`. `benchmarks/routing` fits the shipped model with it, and `headrace train` refits it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headrace.routing.learning.tradeoff import Quality, folds, quality
from headrace.routing.scoring.scorer import Model

Array = NDArray[np.float64]

MIN_ROWS = 40  # with fewer, a refit would follow the noise
_SPREAD = 0.02  # added to a feature's standard deviation, which is too small to trust if it hardly varies
_RIDGES = (300.0, 1000.0, 3000.0)  # the strengths that cross-validation chooses from
_SCALE_DEVIATION = 0.5  # prior standard deviation, around 1, of the scale of the old gains on other traffic
_LEVEL_ROWS = 60.0  # rows that the old model's mean gain counts as
_KIND_ROWS = 15.0  # rows of a kind at which half of a correction is applied to it


def ridge(
    features: Array,
    target: Array,
    strength: float,
    *,
    prior: Array | None = None,
    weights: Array | None = None,
) -> tuple[Array, float]:
    """Return coefficients [F] and intercept of a ridge regression on standardised features.

    strength   how many rows the prior counts as
    prior      [F], coefficients to shrink towards; zero if None
    weights    [rows], weights of the rows; all 1 if None
    """
    each = np.ones(len(target)) if weights is None else weights
    known = np.zeros(features.shape[1]) if prior is None else prior
    rest = target - features @ known
    total = each.sum()
    mean = each @ features / total
    spread = np.sqrt(each @ (features - mean) ** 2 / total) + _SPREAD
    scaled = (features - mean) / spread
    centre = float(each @ rest / total)
    gram = (scaled * each[:, None]).T @ scaled + strength * np.eye(features.shape[1])
    slopes: Array = np.linalg.solve(gram, (scaled * each[:, None]).T @ (rest - centre)) / spread
    return known + slopes, centre - float(mean @ slopes)


def softmax(
    features: Array, labels: NDArray[np.int64], count: int, *, strength: float = 3.0, steps: int = 300
) -> tuple[Array, Array]:
    """Return weights [count, F] and biases [count] of a softmax regression with balanced labels.

    It runs gradient descent with momentum from zero, so the result is always the same.
    """
    sizes = np.bincount(labels, minlength=count)
    weight = (len(labels) / count / sizes)[labels]
    target = np.eye(count)[labels]
    padded = np.hstack([features, np.ones((len(features), 1))])
    weights = np.zeros((count, padded.shape[1]))
    momentum = np.zeros_like(weights)
    penalty = np.full(padded.shape[1], strength / len(labels))
    penalty[-1] = 0.0
    for _ in range(steps):
        logits = padded @ weights.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = (odds / odds.sum(axis=1, keepdims=True) - target) * weight[:, None]
        gradient = error.T @ padded / len(labels) + penalty * weights
        momentum = 0.9 * momentum - 1.0 * gradient
        weights = weights + momentum
    return weights[:, :-1], weights[:, -1]


@dataclass(frozen=True, slots=True)
class Refit:
    """A refitted model and its measured quality.

    before, after   quality of the old and the new model, cross-validated on rows that they had not seen
    """

    model: Model
    before: Quality
    after: Quality


def refit(
    model: Model,
    features: Array,
    weak: Array,
    strong: Array,
    *,
    weights: Array | None = None,
    seed: int = 0,
) -> Refit:
    """Refit *model* to outcomes: features [rows, F], weak and strong [rows] from 0 to 1.

    weights   [rows], how much each counts, above 0 and at most 1; all 1 if None

    The old model is the prior. Its gains are rescaled as far as the rows support it, and corrections per
    feature and per kind are shrunk strongly: a few hundred rows change them where they agree.
    Cross-validation chooses the strength. A kind of prompt with hardly any rows keeps its head.
    Raises ValueError if there are too few rows, or no gain in them.
    """
    if len(weak) < MIN_ROWS:
        raise ValueError(
            f"{len(weak)} rows are too few to fit; at least {MIN_ROWS} are needed, 200 are better"
        )
    model = model.aimed()  # from here on, the outcomes decide what is gained
    gains = strong - weak
    each = np.ones(len(gains)) if weights is None else weights
    if each @ gains <= 0:
        raise ValueError(
            "the large tier is no better than the small one on these rows: there is nothing to fit"
        )
    held_out = {strength: np.zeros(len(gains)) for strength in _RIDGES}
    errors = dict.fromkeys(_RIDGES, 0.0)
    parts = folds(len(gains), 5, seed)
    for strength in _RIDGES:
        for part in parts:
            rest = np.setdiff1d(np.arange(len(gains)), part)
            fitted = _corrected(model, features[rest], gains[rest], each[rest], strength)
            held_out[strength][part] = fitted.gains(features[part])
        errors[strength] = float(each @ (held_out[strength] - gains) ** 2)
    best = min(_RIDGES, key=lambda strength: errors[strength])
    return Refit(
        _corrected(model, features, gains, each, best),
        quality(model.gains(features), weak, strong, each),
        quality(held_out[best], weak, strong, each),
    )


def _corrected(model: Model, features: Array, gains: Array, weights: Array, strength: float) -> Model:
    """Return *model* with its gains rescaled and its level, kinds' levels and features' slopes corrected."""
    old = model.gains(features)
    total = float(weights.sum())
    old_mean = float(weights @ old) / total
    centred = old - old_mean
    about = gains - float(weights @ gains) / total
    # The scale of the old gains, by Bayesian regression with a prior around 1. Rows on which the old gains
    # hardly vary do not determine the scale and leave it near 1.
    noise = float(weights @ about**2) / total + 1e-9
    precision = 1 / _SCALE_DEVIATION**2
    weighted = weights * centred / noise
    scale = float(np.clip((weighted @ about + precision) / (weighted @ centred + precision), 0.0, 2.0))
    level = (weights @ gains + _LEVEL_ROWS * old_mean) / (total + _LEVEL_ROWS)
    rest = about - scale * centred
    kinds = model.kinds_of(features)
    slopes, intercept = ridge(np.hstack([features, kinds]), rest, strength, weights=weights)
    of_features, of_kinds = np.split(slopes, [features.shape[1]])
    # gain = level + scale * (old - mean) + features @ of_features + kinds @ of_kinds + intercept, for kinds
    # that the rows contain
    presence = weights @ kinds
    trusted = presence / (presence + _KIND_ROWS)
    heads = scale * model.heads + of_features
    bias = scale * (model.head_bias - old_mean) + level + intercept + of_kinds
    return replace(
        model,
        heads=trusted[:, None] * heads + (1 - trusted[:, None]) * model.heads,
        head_bias=trusted * bias + (1 - trusted) * model.head_bias,
    )
