"""Define the rows of a decision log: one per request, and one per rating of an answer. Pure functions.

A row is a JSON object. It has what a candidate policy needs to decide the request again (the score's
features, the hints, the state of the tiers), the choice with its probability, and the result. Ratings come
later, so they are rows of their own: `join` adds them to the requests.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from headrace.routing.changes.candidates import floor_of
from headrace.routing.policy import Decision, trouble
from headrace.routing.request import Hints, RoutingRequest
from headrace.routing.scoring.conversation import Turn, turns_of_row
from headrace.routing.scoring.score import Score
from headrace.routing.success.choosing import Weighed
from headrace.routing.tier_view import Price, TierView

DECISION, RATING = "decision", "rating"  # kinds of rows
TOKEN_KINDS = ("prompt", "cached", "completion", "wasted")
_LATE, _IN_TIME = 1.0, 0.0  # answer_seconds of a restored tier, against SECONDS_LEFT
SECONDS_LEFT = 0.5  # with which the views of a row are decided again


class BadRecord(ValueError):
    """A row is not one of a decision log. The message says why."""


@dataclass(frozen=True, slots=True)
class Logged:
    """One request, as the log has it.

    id          made by the router, and unique
    time        when it arrived, in seconds since 1970
    request     its request id, which callers may choose and use again
    answer      id of its answer, made by the router; empty if it has none
    scorer      fingerprint of the scorer; arm: see `RoutingRequest`
    scored, resumes, continues, estimates   see `RoutingRequest`
    reads       digest of the names of the features; see `digest`
    features    those that are present, and their values
    weighed     by which it was decided, as it was before the conversation; None: by score
    floor       the tier that its conversation has reached; empty without one
    tiers       smallest first, as they were when it was decided
    chances     the probability of each tier with which it could be chosen; others could not
    choice      the tier of the first decision; empty if there was none
    tier        that answered, or where the request was last
    characters  of the turns that were scored
    tokens      of prompt, cached prompt, completion and waste, on all tiers
    cost        None without prices
    turns       None unless the log has text
    qualities   0 to 1, by source ("caller", "judge") and tier
    """

    id: str
    time: float
    tenant: str
    request: str
    answer: str
    session: str
    scorer: str
    arm: str
    reads: str
    score: float
    scored: bool
    resumes: bool
    features: Mapping[str, float]
    continues: float
    estimates: Mapping[str, tuple[float, float | None]]
    hints: Hints
    weighed: Weighed | None
    floor: str
    tiers: Sequence[TierView]
    chances: Mapping[str, float]
    choice: str
    tier: str
    cause: str
    outcome: str
    finish: str
    characters: int
    tokens: tuple[int, int, int, int]
    cost: float | None
    seconds: float
    turns: Sequence[Turn] | None = None
    qualities: dict[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rated:
    """The outcome of an answer, as the log has it; see `Logged`."""

    time: float
    tenant: str
    request: str
    tier: str
    quality: float
    source: str
    answer: str = ""


def digest(names: Sequence[str]) -> str:
    """Return a digest of the features that a scorer reads from text, without kinds and earlier turns.

    A candidate that reads the same features can score a request again without its text.
    """
    return _digest(tuple(names))


@lru_cache(maxsize=16)
def _digest(names: tuple[str, ...]) -> str:
    own = [name for name in names if not name.startswith(("kind:", "turn:"))]
    return hashlib.sha256("\n".join(own).encode()).hexdigest()[:12] if own else ""


def of_decision(request: RoutingRequest, score: Score, decision: Decision | None) -> dict[str, Any]:
    """Return the fields of a row that describe how a request was decided."""
    present = ((name, value) for name, value in zip(score.names, score.values, strict=True) if value)
    fields: dict[str, Any] = {
        "arm": request.arm,
        "score": round(request.score, 6),
        "reads": digest(score.names),
        "features": {name: round(value, 6) for name, value in present},
        "continues": round(request.continues, 4),
        "estimates": {
            tier: {"good": round(one.good, 4), "tokens": None if one.tokens is None else round(one.tokens, 1)}
            for tier, one in request.estimates.items()
        },
        "hints": _hints(request.hints),
        **({} if request.scored else {"scored": False}),
        **({"resumes": True} if request.resumes else {}),
    }
    if decision is None:
        return {**fields, "tiers": {}, "choice": "", "cause": "", "chances": {}}
    considered = decision.considered
    names = [tier.name for tier in considered.tiers]
    weighed = considered.weighed
    chances = decision.chances or ((decision.place, 1.0),)
    return {
        **fields,
        **({} if weighed is None else {"weighed": _weighed(weighed)}),
        "floor": floor_of(decision),
        "tiers": {tier.name: _tier(tier, considered.seconds_left) for tier in considered.tiers},
        "choice": decision.tier,
        "cause": decision.cause,
        "chances": {names[place]: round(chance, 6) for place, chance in chances},
    }


def parse(row: Mapping[str, Any]) -> Logged | Rated:
    """Return the content of a row. Raises BadRecord."""
    try:
        if row.get("kind") == DECISION:
            return _parse_decision(row)
        if row.get("kind") == RATING:
            return _parse_rating(row)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        problem = f"field {error}" if isinstance(error, KeyError) else str(error)
        raise BadRecord(f"not a row of a decision log: {problem}") from error
    raise BadRecord(f"not a row of a decision log: its 'kind' is not {DECISION!r} or {RATING!r}")


def join(records: Iterable[Logged | Rated]) -> list[Logged]:
    """Return the requests in the order of their arrival, with their ratings, in any order of *records*.

    A rating names its answer. One that does not is about the tenant's last request of that id before it. Of
    several ratings of an answer by one source, the last one counts.
    """
    requests: list[Logged] = []
    ratings: list[Rated] = []
    for record in records:
        if isinstance(record, Logged):
            requests.append(record)
        else:
            ratings.append(record)
    requests.sort(key=lambda one: one.time)
    by_answer = {one.answer: one for one in requests if one.answer}
    by_request: dict[tuple[str, str], list[Logged]] = {}
    for one in requests:
        by_request.setdefault((one.tenant, one.request), []).append(one)
    for rating in sorted(ratings, key=lambda one: one.time):
        rated = by_answer.get(rating.answer)
        if not rating.answer:
            namesakes = by_request.get((rating.tenant, rating.request), ())
            rated = next((one for one in reversed(namesakes) if one.time <= rating.time), None)
        if rated is not None:
            rated.qualities[rating.source, rating.tier] = rating.quality
    return requests


def _hints(hints: Hints) -> dict[str, Any]:
    """Return the hints that differ from their defaults."""
    return {
        name: value for name in Hints.__slots__ if (value := getattr(hints, name)) != getattr(_NO_HINTS, name)
    }


_NO_HINTS = Hints()


def _weighed(weighed: Weighed) -> dict[str, Any]:
    """Return what a tier was chosen by. The weight is infinite if cost alone counts, which JSON lacks."""
    return {
        "good": [round(one, 6) for one in weighed.good],
        "cost": [float(f"{one:.6g}") for one in weighed.cost],
        "weight": float(f"{weighed.weight:.6g}") if math.isfinite(weighed.weight) else None,
    }


def _tier(tier: TierView, seconds_left: float) -> dict[str, Any]:
    # Thresholds are infinite if no request is meant for the tier, which JSON cannot express.
    threshold = round(tier.threshold, 6) if math.isfinite(tier.threshold) else None
    state: dict[str, Any] = {"from": threshold}
    late, full = trouble(tier, seconds_left)
    problems = ["down"] if not tier.healthy else ["late"] * late + ["full"] * full
    if problems:
        state["state"] = " and ".join(problems)
    if tier.price is not None:
        state["price"] = [tier.price.prompt, tier.price.completion]
        if tier.price.cached_prompt is not None:
            state["price"].append(tier.price.cached_prompt)
    return state


def _parse_decision(row: Mapping[str, Any]) -> Logged:
    score, seconds = _finite(row["score"]), _finite(row["seconds"])
    chances = {sys.intern(str(tier)): _finite(chance) for tier, chance in row["chances"].items()}
    tiers = [_parse_tier(str(name), state) for name, state in row["tiers"].items()]
    choice = str(row["choice"])
    if not all(0 <= one <= 1 for one in (score, *chances.values())):
        raise ValueError("its score and chances must be from 0 to 1")
    if choice and not (0 < chances.get(choice, 0.0) <= 1 and choice in {tier.name for tier in tiers}):
        raise ValueError("its choice has no probability above 0")
    tokens = row["tokens"]
    return Logged(
        id=str(row["id"]),
        time=_finite(row["time"]),
        tenant=str(row.get("tenant", "")),
        request=str(row["request"]),
        answer=str(row.get("answer", "")),
        session=str(row.get("session", "")),
        scorer=str(row.get("scorer", "")),
        arm=str(row.get("arm", "")),
        reads=str(row.get("reads", "")),
        score=score,
        scored=bool(row.get("scored", True)),
        resumes=bool(row.get("resumes", False)),
        features={sys.intern(str(name)): _finite(value) for name, value in row["features"].items()},
        continues=_finite(row.get("continues", 0.0)),
        estimates={
            str(tier): (_finite(one["good"]), None if one["tokens"] is None else _finite(one["tokens"]))
            for tier, one in row.get("estimates", {}).items()
        },
        hints=_parse_hints(row["hints"]),
        weighed=_parse_weighed(row["weighed"], len(tiers)) if "weighed" in row else None,
        floor=str(row.get("floor", "")),
        tiers=tiers,
        chances=chances,
        choice=choice,
        tier=str(row["tier"]),
        cause=str(row.get("cause", "")),
        outcome=str(row["outcome"]),
        finish=str(row.get("finish", "")),
        characters=int(row.get("characters", 0)),
        tokens=tuple(int(tokens[kind]) for kind in TOKEN_KINDS),  # type: ignore[arg-type] # it has four
        cost=None if row["cost"] is None else _finite(row["cost"]),
        seconds=seconds,
        turns=turns_of_row(row) if "prompt" in row or "messages" in row else None,
    )


def _parse_hints(row: Mapping[str, Any]) -> Hints:
    return Hints(
        **{name: str(row.get(name, "")) for name in ("tier", "model", "min_tier", "max_tier")},
        quality_preference=_finite(row.get("quality_preference", 0.5)),
        allow_escalation=bool(row.get("allow_escalation", True)),
    )


def _parse_weighed(row: Mapping[str, Any], tiers: int) -> Weighed:
    good, cost = (tuple(_finite(one) for one in row[name]) for name in ("good", "cost"))
    if not len(good) == len(cost) == tiers:
        raise ValueError("field 'weighed' must have a number per tier")
    return Weighed(good, cost, math.inf if row["weight"] is None else _finite(row["weight"]))


def _parse_tier(name: str, state: Mapping[str, Any]) -> TierView:
    problems = str(state.get("state", "")).split(" and ")
    return TierView(
        name,
        math.inf if state["from"] is None else _finite(state["from"]),
        healthy="down" not in problems,
        saturated="full" in problems,
        answer_seconds=_LATE if "late" in problems else _IN_TIME,
        price=Price(*map(_finite, state["price"])) if "price" in state else None,
    )


def _parse_rating(row: Mapping[str, Any]) -> Rated:
    quality = _finite(row["quality"])
    if not 0 <= quality <= 1:
        raise ValueError("field 'quality' must be from 0 to 1")
    return Rated(
        _finite(row["time"]),
        str(row.get("tenant", "")),
        str(row["request"]),
        str(row["tier"]),
        quality,
        str(row["source"]),
        str(row.get("answer", "")),
    )


def _finite(value: Any) -> float:
    """Return a number. Raises ValueError, TypeError and OverflowError: JSON as Python reads it has others."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("its numbers must be finite")
    return number
