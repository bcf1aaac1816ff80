"""Logistic regression with a Gaussian prior, by Newton's method. Outcomes may be fractions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STEPS = 25  # Newton steps; with a prior, five are usually enough
_CLOSE = 1e-6  # a step this small ends the search
_MOST = 30.0  # log-odds beyond which a probability is 0 or 1 for all purposes


def logistic(
    inputs: Array,
    outcomes: Array,
    *,
    weights: Array,
    strengths: Array,
    offset: Array | float = 0.0,
) -> Array:
    """Return the coefficients [D] that fit *outcomes* best, shrunk to 0.

    inputs      [rows, D]; a column of ones is an intercept
    outcomes    [rows], 0 to 1
    weights     [rows], 0 or more
    strengths   [D], precision of each coefficient's prior
    offset      [rows] or one number, log-odds that are added to each row's
    """
    found = np.zeros(inputs.shape[1])
    loss = _loss(inputs, outcomes, weights, strengths, offset, found)
    for _ in range(_STEPS):
        chance = probability(inputs @ found + offset)
        gradient = inputs.T @ (weights * (chance - outcomes)) + strengths * found
        curvature = weights * np.maximum(chance * (1 - chance), 1e-6)
        step = np.linalg.solve((inputs * curvature[:, None]).T @ inputs + np.diag(strengths), gradient)
        # A full step may overshoot where the outcomes are nearly separable.
        for scale in (1.0, 0.5, 0.25, 0.1, 0.01):
            tried = found - scale * step
            new = _loss(inputs, outcomes, weights, strengths, offset, tried)
            if new <= loss:
                found, loss = tried, new
                break
        else:
            break
        if np.abs(step).max() < _CLOSE:
            break
    return found


def probability(log_odds: Array) -> Array:
    """Return the probabilities for *log_odds*."""
    found: Array = 1 / (1 + np.exp(-np.clip(log_odds, -_MOST, _MOST)))
    return found


def log_odds(chance: Array | float) -> Array:
    """Return the log-odds of probabilities, which may be 0 or 1."""
    known = np.clip(np.asarray(chance, dtype=np.float64), 1e-6, 1 - 1e-6)
    found: Array = np.log(known / (1 - known))
    return found


def log_loss(log_odds: Array, outcomes: Array) -> Array:
    """Return the negative log-likelihood of each row."""
    found: Array = np.logaddexp(0.0, log_odds) - outcomes * log_odds
    return found


def _loss(
    inputs: Array, outcomes: Array, weights: Array, strengths: Array, offset: Array | float, found: Array
) -> float:
    rows = log_loss(inputs @ found + offset, outcomes)
    return float(weights @ rows + 0.5 * strengths @ found**2)
