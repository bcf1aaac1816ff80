"""Fit thresholds to scored traffic: the share of calls and the quality that each choice gives.

`headrace calibrate` writes the chosen thresholds to a small file, and the router reads the file again when it
changes. This module has pure functions and the file format.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import tempfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1  # of the file
KIND = "calibration"
_STEPS = {2: 100, 3: 60}  # number of shares that are tried, by number of tiers
_STEPS_BEYOND = 20
_MAX_BYTES = 1024 * 1024  # of the file; `save` writes a few kilobytes
_MAX_QUANTILES = 10_000


class BadCalibration(ValueError):
    """A calibration cannot be made, or its file cannot be used. The message says why."""


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """One prompt of the traffic to calibrate on.

    score     0 to 1
    quality   how well each tier answered it, 0 to 1, smallest tier first; empty without labels
    """

    score: float
    quality: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """One choice of thresholds, and its result on the traffic.

    thresholds  the lowest score of each tier, ascending from 0
    shares      of calls per tier, smallest first; together 1
    cost        per call, relative to calling the largest tier always
    quality     mean over the calls; None without labels
    recovered   share of the quality gap between smallest and largest tier; None without labels or gap
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    cost: float
    quality: float | None = None
    recovered: float | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The content of a calibration file.

    tiers       names, smallest first
    thresholds  the lowest score of each, ascending from 0
    shares      of calls per tier on the traffic that it was made from
    scorer      fingerprint of the scorer that computed the scores; the thresholds are valid for no other
    rows        number of prompts that it was made from
    quantiles   of their scores, evenly spaced: the initial scores of an adaptive share
    """

    tiers: tuple[str, ...]
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    scorer: str
    rows: int
    quantiles: tuple[float, ...]


def curve(rows: Sequence[ScoredPrompt], costs: Sequence[float]) -> list[Point]:
    """Return the useful choices of thresholds, cheapest first.

    rows    all with labels, or all without
    costs   of a call per tier, smallest tier first, at least two

    With two tiers there is one point per percent of calls to the larger. With more, all combinations of
    shares are tried; with labels, a point is kept if no cheaper one is as good. Raises BadCalibration if
    there are no rows or only some have labels.
    """
    if not rows:
        raise BadCalibration("there are no rows to calibrate on")
    count = len(costs)
    if any(len(row.quality) not in (0, count) for row in rows) or len({len(row.quality) for row in rows}) > 1:
        raise BadCalibration("some rows have labels and some do not; drop one kind, or label all")
    table = _Table(rows, costs)
    steps = min(_STEPS.get(count, _STEPS_BEYOND), len(rows))
    candidates = [table.threshold(1 - step / steps) for step in range(steps + 1)]  # descending thresholds
    points = {
        point.thresholds: point
        for chosen in itertools.combinations_with_replacement(candidates, count - 1)
        for point in [table.point((0.0, *reversed(chosen)))]
    }
    ordered = sorted(points.values(), key=lambda point: (point.cost, -(point.quality or 0)))
    if count == 2 or not rows[0].quality:
        return ordered
    kept: list[Point] = []
    for point in ordered:
        if not kept or (point.quality or 0) > (kept[-1].quality or 0):
            kept.append(point)
    return kept


def for_shares(rows: Sequence[ScoredPrompt], costs: Sequence[float], shares: Sequence[float]) -> Point:
    """Return the thresholds that give each tier after the first its share of calls, smallest tier first.

    Equal scores cannot be separated, so the shares of the returned point may differ. Raises BadCalibration.
    """
    if not rows:
        raise BadCalibration("there are no rows to calibrate on")
    if len(shares) != len(costs) - 1:
        raise BadCalibration(f"{len(costs)} tiers need {len(costs) - 1} shares, one per tier after the first")
    if not all(share >= 0 for share in shares) or sum(shares) > 1 + 1e-9:
        raise BadCalibration("shares must be 0 or more and add up to at most 1")
    table = _Table(rows, costs)
    above = [min(sum(shares[place:]), 1.0) for place in range(len(shares))]
    return table.point((0.0, *(table.threshold(1 - share) for share in above)))


def for_quality(points: Sequence[Point], wanted: float) -> Point:
    """Return the cheapest of *points* that recovers *wanted* of the quality gap. Raises BadCalibration."""
    if all(point.recovered is None for point in points):
        raise BadCalibration(
            "a wanted quality needs labels: rows with the outcome of each tier, such as small_ok and "
            "large_ok, and a largest tier that is better than the smallest"
        )
    good = [point for point in points if point.recovered is not None and point.recovered >= wanted - 1e-9]
    if not good:
        best = max(point.recovered or 0.0 for point in points)
        raise BadCalibration(f"no choice recovers {wanted:.0%} of the gap; the best recovers {best:.0%}")
    return min(good, key=lambda point: point.cost)


def calibration(
    tiers: Sequence[str], point: Point, rows: Sequence[ScoredPrompt], *, scorer: str
) -> Calibration:
    """Return the calibration for the chosen *point*."""
    ordered = sorted(row.score for row in rows)
    last = len(ordered) - 1
    return Calibration(
        tiers=tuple(tiers),
        thresholds=point.thresholds,
        shares=point.shares,
        scorer=scorer,
        rows=len(rows),
        quantiles=tuple(round(ordered[round(step * last / 100)], 6) for step in range(101)),
    )


def save(made: Calibration, path: Path) -> None:
    """Write *made* to *path* atomically, because a router may be reading. Raises OSError."""
    content = {
        "kind": KIND,
        "format": FORMAT,
        "tiers": [
            {"name": name, "threshold": round(threshold, 6), "share": round(share, 4)}
            for name, threshold, share in zip(made.tiers, made.thresholds, made.shares, strict=True)
        ],
        "scorer": made.scorer,
        "rows": made.rows,
        "quantiles": made.quantiles,
    }
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.chmod(name, 0o644)  # mkstemp's 0600 would lock out a router of another user
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path) -> Calibration:
    """Load the calibration at *path*. Raises BadCalibration."""
    try:
        content: Any = json.loads(_text(path))
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise BadCalibration(f"{path} is not a calibration; `headrace calibrate` makes one")
        if content["format"] != FORMAT:
            raise BadCalibration(
                f"{path} has format {content['format']!r}, this version reads {FORMAT}: calibrate again"
            )
        made = Calibration(
            tiers=tuple(str(tier["name"]) for tier in content["tiers"]),
            thresholds=tuple(float(tier["threshold"]) for tier in content["tiers"]),
            shares=tuple(float(tier["share"]) for tier in content["tiers"]),
            scorer=str(content["scorer"]),
            rows=int(content["rows"]),
            quantiles=tuple(float(value) for value in content["quantiles"]),
        )
    except OSError as error:
        raise BadCalibration(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, BadCalibration):
            raise
        raise BadCalibration(f"{path} is damaged: {error!r}") from error
    if not are_thresholds(made.thresholds, len(made.tiers)):
        raise BadCalibration(f"{path}: thresholds must ascend from 0 and be at most 1")
    if len(made.quantiles) > _MAX_QUANTILES or not all(0 <= value <= 1 for value in made.quantiles):
        raise BadCalibration(f"{path}: quantiles must be at most {_MAX_QUANTILES} scores, each from 0 to 1")
    return made


def _text(path: Path) -> str:
    """Return the text of a regular file. A pipe, which could block, and an endless device are rejected."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
        raise BadCalibration(f"{path} is not a calibration: not a file of at most {_MAX_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def are_thresholds(values: Sequence[float], tiers: int) -> bool:
    """Whether *values* are valid thresholds of this number of tiers: ascending from 0, at most 1."""
    return (
        len(values) == tiers > 0
        and values[0] == 0
        and list(values) == sorted(values)
        and all(0 <= value <= 1 for value in values)
    )


def qualities(row: Mapping[str, Any], tiers: Sequence[str]) -> tuple[float, ...]:
    """Return the labels of one row: `NAME_ok` for each tier, true, false or 0 to 1; empty if there are none.

    Raises BadCalibration if labels are out of range or some tiers have none.
    """
    values = [row.get(f"{tier}_ok") for tier in tiers]
    if all(value is None for value in values):
        return ()
    if any(value is None for value in values):
        raise BadCalibration(f"a row needs all of {', '.join(f'{tier}_ok' for tier in tiers)}, or none")
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
        raise BadCalibration("labels must be true, false or numbers from 0 to 1")
    return tuple(float(value) for value in values if value is not None)


class _Table:
    """Rows in the order of their scores, with cumulative sums, to evaluate thresholds quickly."""

    def __init__(self, rows: Sequence[ScoredPrompt], costs: Sequence[float]) -> None:
        ordered = sorted(rows, key=lambda row: row.score)
        self._scores = [row.score for row in ordered]
        self._costs = [cost / (costs[-1] or 1.0) for cost in costs]
        self._labelled = bool(ordered[0].quality)
        self._sums = [
            [0.0, *itertools.accumulate(row.quality[place] for row in ordered)] if self._labelled else []
            for place in range(len(costs))
        ]

    def threshold(self, below: float) -> float:
        """Return a threshold with about this share of the scores below it, midway between two scores."""
        count = len(self._scores)
        at = round(below * count)
        if at <= 0:
            return 0.0
        # Equal scores cannot be separated: take the nearer end of their run.
        start = bisect_left(self._scores, self._scores[min(at, count - 1)])
        if at < count and at - start > 0:
            end = start
            while end < count and self._scores[end] == self._scores[start]:
                end += 1
            at = start if at - start <= end - at else end
        if at == 0:
            return 0.0
        upper = self._scores[at] if at < count else 1.0
        return (self._scores[at - 1] + upper) / 2

    def point(self, thresholds: tuple[float, ...]) -> Point:
        """Return the result of these thresholds."""

        count = len(self._scores)
        cuts = [0, *(bisect_left(self._scores, value) for value in thresholds[1:]), count]
        shares = tuple((cuts[place + 1] - cuts[place]) / count for place in range(len(self._costs)))
        cost = sum(share * price for share, price in zip(shares, self._costs, strict=True))
        if not self._labelled:
            return Point(thresholds, shares, cost)
        quality = (
            sum(sums[cuts[place + 1]] - sums[cuts[place]] for place, sums in enumerate(self._sums)) / count
        )
        low, high = self._sums[0][-1] / count, self._sums[-1][-1] / count
        recovered = (quality - low) / (high - low) if high > low else None
        return Point(thresholds, shares, cost, quality, recovered)
