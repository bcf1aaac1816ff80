"""Estimate what a candidate policy would have achieved on logged requests. Pure functions on arrays.

The log has the result of the tier that was chosen, and the probability with which it was chosen. Three
estimators use both:

- `ips` weighs each result with the inverse of its probability (Horvitz & Thompson, 1952);
- `snips` divides by the sum of the weights, which varies less (Swaminathan & Joachims, 2015);
- `dr` predicts every tier's result with a model and corrects the predictions with weighted errors. It is
  right if either the probabilities or the model are (Dudik, Langford & Li, "Doubly Robust Policy Evaluation
  and Learning", 2011). Each row is predicted by a model that was not fitted to its cluster.

A result that is not known, such as the quality of an answer that nobody rated, is assumed to be missing at
random on each tier: its weight includes the share of answers of that tier that have one. The results of
shadow requests are known with a probability as well, and count in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Places = NDArray[np.int64]

MIN_EVIDENCE = 10  # results of requests where the policies differ, on the tier that the candidate chooses
MAX_UNSUPPORTED = 0.02  # share of requests that may go where the log never sends any
_FOLDS = 5
_PENALTIES = (3.0, 30.0, 300.0, 3000.0)  # of the ridge, one of which is chosen by cross-validation
_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Sample:
    """Logged requests: n rows, A tiers, F features.

    features   [n, F], known before the decision
    chances    [n, A], the probability of each tier
    choice     [n], place of the tier that was chosen, of a probability above 0
    candidate  [n], place of the tier that the candidate chooses
    results    [n, A], of each tier where it is known, else NaN; the column of `choice` is the logged result,
               the others are of shadow requests
    clusters   [n], rows of one cluster, such as a tenant, depend on each other
    """

    features: Array
    chances: Array
    choice: Places
    candidate: Places
    results: Array
    clusters: Places


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The mean result of the candidate beside that of the logged policy.

    rows, known      requests, and those with a result
    differ           share of requests for which the candidate chooses another tier
    evidence         known results of those on the tier that the candidate chooses
    unsupported      share of requests for which no results of the candidate's or the logged tier can be known
    effective_rows   number of rows of equal weight that vary as little as the weighted ones (Kish)
    difference       candidate minus logged, doubly robust
    problem          why the log cannot tell; empty if it can
    """

    rows: int
    known: int
    differ: float
    evidence: int
    unsupported: float
    effective_rows: float
    logged: Interval
    ips: Interval
    snips: Interval
    dr: Interval
    difference: Interval
    problem: str = ""


def compare(sample: Sample, *, bounded: bool = False) -> Comparison:
    """Compare the candidate with the logged policy.

    bounded   the results are from 0 to 1: requests whose results can never be known could have any of these,
              and widen the intervals

    Raises ValueError if no result is known.
    """
    rows, chosen, candidate = np.arange(len(sample.choice)), sample.choice, sample.candidate
    known = np.isfinite(sample.results)
    if not known[rows, chosen].any():
        raise ValueError("no result is known")
    predicted = _predictions(sample, bounded=bounded)
    errors = np.where(known, sample.results - predicted, 0.0)
    likeliest = sample.chances.max(axis=1, keepdims=True)
    # Where chance alone decides, no tier is the logged policy's.
    alone = (sample.chances == likeliest).sum(axis=1) == 1
    differs = ~alone | (sample.chances[rows, candidate] < likeliest[:, 0])
    shares = _known_shares(sample, known, differs)
    # The probability that the result of each tier is known, [n, A].
    probability = np.einsum("na,nat->nt", sample.chances, shares)
    supported = probability[rows, candidate] > 0
    weight = np.zeros(len(rows))
    np.divide(known[rows, candidate], probability[rows, candidate], out=weight, where=supported)
    own_share = shares[rows, chosen, chosen]
    own_weight = np.zeros(len(rows))
    np.divide(known[rows, chosen], own_share, out=own_weight, where=own_share > 0)

    at_logged = predicted[rows, chosen] + own_weight * errors[rows, chosen]
    at_candidate = predicted[rows, candidate] + weight * errors[rows, candidate]
    unsupported = float((~supported | (own_share <= 0)).mean())
    evidence = differs & known[rows, candidate]
    doubt = _doubt(weight, evidence, candidate) if bounded else 0.0
    weighted = weight * np.where(known, sample.results, 0.0)[rows, candidate]
    total = float(weight.sum())
    mean = float(weighted.sum()) / total if total else math.nan
    scale = len(rows) / total if total else math.nan
    wider = unsupported if bounded else 0.0
    return Comparison(
        rows=len(rows),
        known=int(known[rows, chosen].sum()),
        differ=float(differs.mean()),
        evidence=int(evidence.sum()),
        unsupported=unsupported,
        effective_rows=total**2 / float((weight**2).sum()) if total else 0.0,
        logged=_clip(_interval(at_logged, sample.clusters), bounded=bounded),
        ips=_interval(weighted, sample.clusters, doubt, wider),
        snips=_interval(mean + scale * (weighted - weight * mean), sample.clusters, doubt, wider),
        dr=_clip(_interval(at_candidate, sample.clusters, doubt, wider), bounded=bounded),
        difference=_interval(at_candidate - at_logged, sample.clusters, doubt, wider),
        problem=_problem(float(differs.mean()), int(evidence.sum()), unsupported),
    )


def _problem(differ: float, evidence: int, unsupported: float) -> str:
    """Return why the log cannot tell how the candidate does; empty if it can."""
    if unsupported > MAX_UNSUPPORTED:
        return f"for {unsupported:.1%} of the requests it has no results of the tier in question"
    if differ and evidence < MIN_EVIDENCE:
        return (
            f"the policies differ on {differ:.1%} of the requests, and only {evidence} of those have a "
            f"result on the candidate's tier (at least {MIN_EVIDENCE} are needed)"
        )
    return ""


def _known_shares(sample: Sample, known: NDArray[np.bool_], differs: NDArray[np.bool_]) -> Array:
    """Return how often the result of a tier is known if another or the same tier was chosen, [n, A, A].

    The share of answers that are rated is that of each tier. The share of shadow requests may depend on
    whether the policies differ, because a candidate may be tried in this way.
    """
    tiers = sample.chances.shape[1]
    shares = np.zeros((2, tiers, tiers))
    for tier in range(tiers):
        for group in (False, True):
            at = (sample.choice == tier) & (differs == group)
            shares[int(group), tier] = known[at].mean(axis=0) if at.any() else 0.0
        at = sample.choice == tier
        shares[:, tier, tier] = known[at, tier].mean() if at.any() else 0.0
    of_rows: Array = shares[differs.astype(int)]
    return of_rows


def _doubt(weights: Array, evidence: NDArray[np.bool_], candidate: Places) -> float:
    """Return a variance to add to that of the sum, as of two results per tier that are off by half the range.

    This is the idea of Agresti & Coull (1998): without it, an interval from 10 equal results has no width.
    """
    tiers = np.unique(candidate[evidence])
    squares = (weights[evidence & (candidate == tier)] ** 2 for tier in tiers)
    return sum(2 * 0.25 * float(one.mean()) for one in squares)


def _interval(values: Array, clusters: Places, doubt: float = 0.0, wider: float = 0.0) -> Interval:
    """Return the mean and its interval, from the sums of the clusters.

    doubt   added to the variance of the sum
    wider   added to both sides

    The quantile is Student's, with as many degrees of freedom as clusters of equal size would have that vary
    like these: a few rows with large weights give a wide interval.
    """
    mean = float(values.mean())
    sums = np.bincount(clusters, values - mean)
    count = int((np.bincount(clusters) > 0).sum())
    squares = sums**2
    total = float(squares.sum())
    if count < 2 or not math.isfinite(total):
        return Interval(mean, -math.inf, math.inf)
    variance = (total * count / (count - 1) + doubt) / len(values) ** 2
    # A normal distribution's fourth moment is three times the square of its variance.
    fourth = float((squares**2).sum())
    freedom = min(3 * total**2 / fourth, count - 1) if fourth else count - 1
    half = _quantile(freedom) * math.sqrt(variance) + wider
    return Interval(mean, mean - half, mean + half)


def _clip(interval: Interval, *, bounded: bool) -> Interval:
    if not bounded:
        return interval
    return Interval(*(min(max(value, 0.0), 1.0) for value in (interval.value, interval.low, interval.high)))


def _quantile(freedom: float) -> float:
    """Return the 0.975 quantile of Student's distribution (Abramowitz & Stegun, 26.7.5)."""
    z, n = _Z, max(freedom, 2.0)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _predictions(sample: Sample, *, bounded: bool) -> Array:
    """Return the predicted result of each tier, [n, A], by models not fitted to the row's cluster."""
    rows, tiers = sample.chances.shape
    spread = sample.features.std(axis=0)
    kept = spread > 1e-9
    scaled = (sample.features[:, kept] - sample.features[:, kept].mean(axis=0)) / spread[kept]
    row, tier = np.nonzero(np.isfinite(sample.results))
    results = sample.results[row, tier]
    design = _design(scaled[row], tier, tiers)
    # A cluster's fold follows from its number alone.
    fold = (sample.clusters * 2654435761 % 2**32) * _FOLDS // 2**32
    grams = [design[fold[row] == one].T @ design[fold[row] == one] for one in range(_FOLDS)]
    moments = [design[fold[row] == one].T @ results[fold[row] == one] for one in range(_FOLDS)]
    best, least = np.zeros((rows, tiers)), math.inf
    for penalty in _PENALTIES:
        predicted = np.zeros((rows, tiers))
        for one in range(_FOLDS):
            gram, moment = sum(grams) - grams[one], sum(moments) - moments[one]
            ridge = np.full(len(gram), penalty)
            ridge[0] = 1e-6  # the mean
            ridge[1 : 1 + tiers] = 1.0  # each tier's difference from it
            weights = np.linalg.solve(gram + np.diag(ridge), moment)
            mine = fold == one
            for place in range(tiers):
                at = np.full(int(mine.sum()), place)
                predicted[mine, place] = _design(scaled[mine], at, tiers) @ weights
        loss = float(((predicted[row, tier] - results) ** 2).sum())
        if loss < least:
            best, least = predicted, loss
    return best.clip(0.0, 1.0) if bounded else best


def _design(features: Array, tier: Places, tiers: int) -> Array:
    """Return [rows, columns]: 1, the tier, the features, and the features of each tier."""
    one_hot = np.eye(tiers)[tier]
    crossed = (one_hot[:, :, None] * features[:, None, :]).reshape(len(features), tiers * features.shape[1])
    return np.hstack([np.ones((len(features), 1)), one_hot, features, crossed])
