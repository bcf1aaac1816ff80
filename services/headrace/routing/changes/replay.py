"""Decide logged requests again with a candidate: another scorer, other thresholds, or both. Pure functions.

Each request is decided as the router would have: by `policy.decide`, with the tiers, hints and conversation
of its row. `estimating.py` estimates what the candidate's choices would have achieved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from headrace.routing.changes.estimating import Array, Places, Sample
from headrace.routing.changes.records import SECONDS_LEFT, Logged, digest
from headrace.routing.no_route import NoRoute
from headrace.routing.policy import decide
from headrace.routing.scoring import prompt_features
from headrace.routing.scoring.conversation import Earlier, remembered
from headrace.routing.scoring.score import fingerprint, sigmoid
from headrace.routing.scoring.scorer import LearnedScorer, Model
from headrace.routing.share import ShareKeeper
from headrace.routing.success.choosing import Weighed

FAILURES = ("failed", "deadline", "refused")  # outcomes that count as errors of the router
_SEEN = 128  # scores that a share starts with
_MAX_FEATURES = 40  # of the model of results
_MIN_TENANTS = 20  # from which on a tenant's requests are a cluster
_IDLE_SECONDS = 600.0  # after which a conversation is forgotten


@dataclass(frozen=True)
class Candidate:
    """What is evaluated.

    scorer       None: the scores of the log
    thresholds   of each tier, ascending from 0; None: adapted to *shares*
    shares       of calls of each tier after the first; None, without thresholds: as logged

    Without thresholds and shares, a request that was chosen by expected quality and cost is chosen by these
    again, with the candidate's estimates of quality, if it has them.
    """

    scorer: LearnedScorer | None = None
    thresholds: Sequence[float] | None = None
    shares: Sequence[float] | None = None


@dataclass(frozen=True)
class Replayed:
    """Logged requests, and the candidate's choices.

    requests    that could be decided again
    tiers       names, smallest first
    chosen      place of the tier that the candidate chooses
    features    [n, F], what is known of each request: the scores of both, and features of the log
    unscored    number of requests that were left out because the candidate cannot score them
    left_out    number of other requests that were left out: without a decision, of other tiers, or (if the
                candidate has no scorer) of other scorers than the last
    shares      that the thresholds were adapted to; None with fixed ones
    weighed     number of requests that the candidate chooses by expected quality and cost
    """

    requests: Sequence[Logged]
    tiers: tuple[str, ...]
    chosen: Sequence[int]
    features: Array
    unscored: int
    left_out: int
    shares: Sequence[float] | None
    weighed: int


@dataclass(frozen=True, slots=True)
class _Scored:
    """A candidate's score of a request, and its P(good) of each tier that it has estimates of.

    good   None: as in the log
    """

    value: float
    good: Mapping[str, float] | None


def replay(
    requests: Sequence[Logged],
    candidate: Candidate,
    progress: Callable[[Iterable[Logged]], Iterable[Logged]] = iter,
) -> Replayed:
    """Decide *requests*, in the order of their arrival, again.

    The tiers are those of the last request; requests that had other ones are left out. If the candidate has
    no scorer, so are those of other scorers than the last: its thresholds are meaningless for them.
    *progress* may report how far the scoring is. Raises ValueError if no request can be decided, or if the
    thresholds or shares are not as many as the tiers need.
    """
    decided = [one for one in requests if one.choice]
    if not decided:
        raise ValueError("the log has no decisions")
    last = latest(decided)
    tiers = tuple(tier.name for tier in last.tiers)
    same = [
        one
        for one in decided
        if tuple(tier.name for tier in one.tiers) == tiers
        and (candidate.scorer is not None or one.scorer == last.scorer)
    ]
    score_of = _Rescoring(candidate.scorer)
    found = [(one, score_of(one)) for one in progress(same)]
    scored = [(one, score) for one, score in found if score is not None]
    by_score = candidate.thresholds is not None or candidate.shares is not None
    if not scored:
        raise ValueError(
            "the candidate cannot score the requests of the log, which has no text and other features: run "
            "the router with --decision-log-text, or fit the candidate with this version of Headrace"
        )
    usual = [_usual(one, tiers) for one, _ in scored]
    shares = candidate.shares
    if candidate.thresholds is not None:
        _check_count(candidate.thresholds, len(tiers), "thresholds, one per tier")
        shares = None
    elif shares is None:
        free = [one.choice for one, _ in scored if _counts(one)]
        shares = [free.count(tier) / max(len(free), 1) for tier in tiers[1:]]
    else:
        _check_count(shares, len(tiers) - 1, "shares, one per tier after the first")
    keeper = None
    if shares is not None:
        keeper = ShareKeeper(shares, seen=[score.value for one, score in scored if _counts(one)][:_SEEN])
    chosen, weighed = [], 0
    for (one, score), place in zip(scored, usual, strict=True):
        expected = None if by_score else _weighed(one, score, tiers)
        weighed += expected is not None
        chosen.append(_choose(one, score, place, candidate.thresholds, keeper, expected))
    return Replayed(
        requests=[one for one, _ in scored],
        tiers=tiers,
        chosen=chosen,
        features=_features([one for one, _ in scored], [score.value for _, score in scored]),
        unscored=len(found) - len(scored),
        left_out=len(requests) - len(same),
        shares=shares,
        weighed=weighed,
    )


def latest(decided: Sequence[Logged]) -> Logged:
    """Return the last of *decided* that the scorer in use has scored; the last one if a canary scored all."""
    return next((one for one in reversed(decided) if not one.arm), decided[-1])


def sample(replayed: Replayed, result: Callable[[Logged, str], float | None]) -> Sample:
    """Return the requests and choices as arrays.

    result   returns the result of a request on a tier; None if it is not known
    """
    requests, tiers = replayed.requests, replayed.tiers
    places = {tier: place for place, tier in enumerate(tiers)}
    results = [[result(one, tier) for tier in tiers] for one in requests]
    return Sample(
        features=replayed.features,
        chances=np.array([[one.chances.get(tier, 0.0) for tier in tiers] for one in requests]),
        choice=np.array([places[one.choice] for one in requests]),
        candidate=np.array(replayed.chosen),
        results=np.array([[np.nan if one is None else one for one in row] for row in results]),
        clusters=clusters(requests),
    )


def quality(request: Logged, tier: str, source: str) -> float | None:
    """Return how good the answer of a request was if its first choice was *tier*; None if it is not known.

    source   of ratings

    A rating of the answer counts for the tier that was chosen, even if another one answered in the end. Other
    ratings are of shadow requests, and count for their own tier.
    """
    if tier == request.choice:
        return request.qualities.get((source, request.tier))
    return None if tier == request.tier else request.qualities.get((source, tier))


def cost(request: Logged, tier: str) -> float | None:
    """Return the cost of a request on the tier that was chosen."""
    return request.cost if tier == request.choice else None


def failed(request: Logged, tier: str) -> float | None:
    """Return 1 for a request that failed on the tier that was chosen, and 0 for one that did not."""
    if tier != request.choice or request.outcome in ("cancelled", "invalid"):
        return None
    return float(request.outcome in FAILURES)


def seconds(request: Logged, tier: str) -> float | None:
    """Return how long a complete answer took on the tier that was chosen."""
    return request.seconds if tier == request.choice and request.outcome == "ok" else None


def clusters(requests: Sequence[Logged]) -> Places:
    """Return a number per request, equal for those that depend on each other.

    These are the requests of a tenant, if there are many tenants, or else those of a conversation.
    """
    tenants = {one.tenant for one in requests if one.tenant}
    by_tenant = len(tenants) >= _MIN_TENANTS
    numbers: dict[tuple[str, ...], int] = {}
    found = []
    for one in requests:
        key: tuple[str, ...] = ("", "", one.id)
        if by_tenant and one.tenant:
            key = (one.tenant,)
        elif one.session:
            key = (one.tenant, one.session)
        found.append(numbers.setdefault(key, len(numbers)))
    return np.array(found, dtype=np.int64)


class _Rescoring:
    """Scores logged requests with a candidate, in the order of their arrival.

    What the router remembers of a conversation is what the candidate would have remembered.
    """

    def __init__(self, scorer: LearnedScorer | None) -> None:
        self._scorer = scorer
        self._fingerprint = "" if scorer is None else fingerprint(scorer)
        self._reads = "" if scorer is None else digest(prompt_features.NAMES)
        self._earlier: dict[tuple[str, str], tuple[float, Earlier]] = {}

    def __call__(self, request: Logged) -> _Scored | None:
        """Return the score of a request; None if the candidate cannot score it."""
        if self._scorer is None or not request.scored or request.scorer == self._fingerprint:
            return _Scored(request.score, None)
        if request.turns:
            key = (request.tenant, request.session)
            then, earlier = self._earlier.get(key, (0.0, None))
            if request.time - then > _IDLE_SECONDS:
                earlier = None
            score = self._scorer.score_turns(request.turns, earlier)
            if request.session and request.answer:
                now = remembered(earlier, score.value, score.carried, request.tier)
                self._earlier[key] = (request.time, now)
            return _Scored(score.value, {tier: one.good for tier, one in score.estimates.items()})
        return self._from_features(request, self._scorer.model)

    def _from_features(self, request: Logged, model: Model) -> _Scored | None:
        """Return the score from the features in the row, if they are those that the candidate reads."""
        if request.reads != self._reads or any(name.startswith("turn:") for name in request.features):
            return None
        features = np.array([request.features.get(name, 0.0) for name in prompt_features.NAMES])
        gain = float(model.gains(features[None])[0])
        tiers = model.tiers
        estimates = {} if tiers is None else tiers.estimates(features, model.kinds_of(features))
        return _Scored(
            sigmoid(model.steepness * (gain - model.centre)),
            {tier: one.good for tier, one in estimates.items()},
        )


def _weighed(request: Logged, score: _Scored, tiers: Sequence[str]) -> Weighed | None:
    """Return what the candidate expects of each tier: its quality, at the cost that the router expected."""
    if request.weighed is None or score.good is None:
        return request.weighed
    if not all(tier in score.good for tier in tiers):
        return None
    return replace(request.weighed, good=tuple(score.good[tier] for tier in tiers))


def _choose(
    request: Logged,
    score: _Scored,
    usual: int,
    thresholds: Sequence[float] | None,
    keeper: ShareKeeper | None,
    weighed: Weighed | None,
) -> int:
    """Return the place of the candidate's choice."""
    hints = request.hints
    if hints.tier or hints.model or request.resumes or not request.scored:
        return usual  # the candidate has no part in it
    marks = keeper.thresholds() if keeper is not None else thresholds or ()
    views = [replace(tier, threshold=mark) for tier, mark in zip(request.tiers, marks, strict=True)]
    try:
        decision = decide(
            score.value, hints, views, floor=request.floor, seconds_left=SECONDS_LEFT, weighed=weighed
        )
    except NoRoute:
        return usual
    if keeper is not None and weighed is None and _counts(request):
        keeper.record(score.value, decision.wanted)
    return decision.place


def _usual(request: Logged, tiers: Sequence[str]) -> int:
    return tiers.index(max(request.chances, key=lambda tier: request.chances[tier]))


def _counts(request: Logged) -> bool:
    """Whether a request counts towards the shares; see `RoutingRequest.counts`."""
    return request.hints.free and request.scored and not request.resumes


def _check_count(values: Sequence[float], wanted: int, what: str) -> None:
    if len(values) != wanted:
        raise ValueError(f"the tiers of the log need {wanted} {what}; {len(values)} were given")


def _features(requests: Sequence[Logged], scores: Sequence[float]) -> Array:
    """Return [n, F]: both scores, the length, and the features of the log that most requests have."""
    counts: dict[str, int] = {}
    for one in requests:
        for name in one.features:
            counts[name] = counts.get(name, 0) + 1
    names = sorted(counts, key=lambda name: (-counts[name], name))[:_MAX_FEATURES]
    columns: Mapping[str, int] = {name: place for place, name in enumerate(names)}
    found = np.zeros((len(requests), len(names) + 5))
    for row, one in enumerate(requests):
        length = one.characters / 1000
        found[row, :5] = one.score, scores[row], one.continues, length, math.log1p(length)
        for name, value in one.features.items():
            if (place := columns.get(name)) is not None:
                found[row, 5 + place] = value
    return found
