"""Read outcomes of answers from rows of JSON: those of the router's --feedback file, or the user's own."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from headrace.cli.files.rows import BadRow, read_rows
from headrace.routing.learning.success import Outcomes
from headrace.routing.learning.weights import bounded, recency
from headrace.routing.scoring.conversation import turns_of_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from headrace.routing.scoring.conversation import Turn
    from headrace.routing.scoring.scorer import LearnedScorer

ANONYMOUS = "anonymous"  # identity of callers without credentials, whose tenants' names are their own choice
CONTINUES = 0.5  # from which on the last turn of a conversation depends on the ones before
_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The quality of one tier's answer, 0 to 1.

    reporter   who reported it: the tenant, or everybody without credentials together
    absolute   False for the result of a comparison with another tier's answer
    tokens     NaN if not known
    time       seconds since 1970; NaN if not known
    """

    tier: str
    good: float
    reporter: str
    absolute: bool
    tokens: float
    time: float


@dataclass(slots=True)
class Asked:
    """A prompt or conversation, and the outcomes of answers to it."""

    turns: Sequence[Turn]
    outcomes: list[Outcome] = field(default_factory=list)


def read_outcomes(path: str, tiers: Sequence[str]) -> list[Asked]:
    """Read rows with `prompt` or `messages` and `NAME_ok` of any of *tiers*. Equal prompts are merged.

    Raises BadRow.
    """
    asked: dict[tuple[Turn, ...], Asked] = {}
    for row in read_rows(path, [], numbers=[f"{tier}_ok" for tier in tiers]):
        try:
            turns = tuple(turns_of_row(row))
            outcomes = [_outcome(row, tier) for tier in tiers if f"{tier}_ok" in row]
        except (ValueError, OverflowError) as error:
            raise BadRow(f"{path}, row {row['id']!r}: {error}") from error
        asked.setdefault(turns, Asked(turns)).outcomes.extend(outcomes)
    if not asked:
        raise BadRow(f"{path} has no rows")
    return list(asked.values())


def inputs_of(asked: Iterable[Asked], scores: LearnedScorer) -> tuple[list[Asked], NDArray[np.float64]]:
    """Return what can be fitted, and its inputs [P, F + K]: features, then kinds.

    A turn that continues a conversation, such as "yes, go on", is left out: its score is that of the turns
    before, which its outcome does not describe.
    """
    count = len(scores.model.kinds)
    features = scores.model.gate.shape[1]
    kept, rows = [], []
    for each in asked:
        score = scores.score_turns(each.turns)
        if score.continues < CONTINUES:
            kept.append(each)
            # An array takes a quarter of the memory of its numbers as objects.
            rows.append(np.array((*score.values[count : count + features], *score.values[:count])))
    return kept, np.array(rows, dtype=np.float64).reshape(len(kept), features + count)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The mean outcomes of two tiers, for N prompts that have both.

    places         [N], of the prompts
    weak, strong   [N], 0 to 1
    weight         [N], 0 to 1
    """

    places: NDArray[np.intp]
    weak: NDArray[np.float64]
    strong: NDArray[np.float64]
    weight: NDArray[np.float64]


def of_both(asked: Sequence[Asked], weak: str, strong: str, *, most_per_tenant: float) -> Pairs:
    """Return the prompts with outcomes of both tiers. The weight of a reporter's outcomes is bounded."""
    weights, sums = np.zeros((2, len(asked))), np.zeros((2, len(asked)))
    for row, tier in enumerate((weak, strong)):
        found = [
            (place, outcome)
            for place, each in enumerate(asked)
            for outcome in each.outcomes
            if outcome.tier == tier
        ]
        places = np.array([place for place, _ in found], dtype=np.int64)
        reporters = [outcome.reporter for _, outcome in found]
        each_weight = bounded(np.ones(len(found)), reporters, most=most_per_tenant)
        good = np.array([outcome.good for _, outcome in found])
        weights[row] = np.bincount(places, each_weight, len(asked))
        sums[row] = np.bincount(places, each_weight * good, len(asked))
    both = np.flatnonzero((weights > 0).all(axis=0))
    means = sums[:, both] / weights[:, both]
    return Pairs(both, means[0], means[1], np.minimum(weights[:, both].min(axis=0), 1.0))


def of_tiers(
    asked: Sequence[Asked],
    inputs: NDArray[np.float64],
    tiers: Sequence[str],
    *,
    half_life_days: float,
    most_per_tenant: float,
) -> tuple[Outcomes, dict[str, tuple[float, float]]]:
    """Return the outcomes to fit, weighted; and, by reporter, the weight before and after it was bounded.

    Results of comparisons say which tier is better and not how good it is, so they are left out.
    """
    found = [
        (place, outcome)
        for place, each in enumerate(asked)
        for outcome in each.outcomes
        if outcome.absolute and outcome.tier in tiers
    ]
    times = np.array([outcome.time for _, outcome in found], dtype=np.float64)
    newest = np.nanmax(times) if np.isfinite(times).any() else math.nan
    weights = recency((newest - times) / _DAY, half_life_days)
    tier = np.array([tiers.index(outcome.tier) for _, outcome in found], dtype=np.int64)
    reporters = [outcome.reporter for _, outcome in found]
    after = weights.copy()
    for place in range(len(tiers)):
        of = np.flatnonzero(tier == place)
        after[of] = bounded(weights[of], [reporters[row] for row in of], most=most_per_tenant)
    totals: dict[str, tuple[float, float]] = {}
    for reporter, whole, part in zip(reporters, weights.tolist(), after.tolist(), strict=True):
        before_sum, after_sum = totals.get(reporter, (0.0, 0.0))
        totals[reporter] = (before_sum + whole, after_sum + part)
    return Outcomes(
        inputs=inputs,
        prompt=np.array([place for place, _ in found], dtype=np.int64),
        tier=tier,
        good=np.array([outcome.good for _, outcome in found], dtype=np.float64),
        weight=after,
        tokens=np.array([outcome.tokens for _, outcome in found], dtype=np.float64),
    ), totals


def _outcome(row: dict[str, Any], tier: str) -> Outcome:
    """Return the outcome of a tier in a row. Raises ValueError."""
    tokens = row.get(f"{tier}_tokens")
    if tokens is not None and not (_is_number(tokens) and tokens >= 0):
        raise ValueError(f"field '{tier}_tokens' must be a number of 0 or more")
    for name in ("tenant", "identity", "source"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"field {name!r} must be a string")
    anonymous = row.get("identity") == ANONYMOUS
    return Outcome(
        tier,
        float(row[f"{tier}_ok"]),
        reporter=f"{ANONYMOUS} callers" if anonymous else row.get("tenant", ""),
        absolute=row.get("source") != "judge",
        tokens=math.nan if tokens is None else float(tokens),
        time=_seconds(row.get("time")),
    )


def _seconds(value: object) -> float:
    """Return a time as seconds since 1970; NaN for none. Raises ValueError and OverflowError."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        found = datetime.fromisoformat(value).timestamp()
    elif _is_number(value):
        found = float(value)
    else:
        raise ValueError("field 'time' must be seconds since 1970, or a time such as 2026-11-28T20:00Z")
    if found > time.time() + _DAY:
        # Beside it, all other outcomes would be too old to count.
        raise ValueError("field 'time' is in the future; it is in seconds since 1970, not in milliseconds")
    return found


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a finite number. Raises OverflowError for an integer beyond all floats."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
