"""Compare the estimates of `headrace replay` with the truth, on simulated traffic.

    python -m benchmarks.routing.replay DATA [--runs N] [--requests N]

Requests are drawn from the families of DATA (see `data.py`) that have outcomes of a weak and a strong model,
each family with the same weight, so the true result of any policy is known. A router with the shipped scorer
keeps 30 % of the calls on the strong model, explores, and gets ratings of some answers. Each run writes the
rows of its decision log and replays several candidates from them. It prints the true difference in
quality and cost between candidate and logged policy, the mean estimate, the root mean square error, how often
the 95 % interval contains the truth, and how often the log could tell.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.routing.data import Array, families
from headrace.routing.changes import records
from headrace.routing.changes import replay as replaying
from headrace.routing.changes.estimating import Comparison, Places, compare
from headrace.routing.changes.exploring import explore
from headrace.routing.changes.records import Logged, join, of_decision
from headrace.routing.changes.replay import Candidate
from headrace.routing.learning.fitting import refit
from headrace.routing.policy import decide
from headrace.routing.request import Hints, RoutingRequest
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import Score
from headrace.routing.scoring.scorer import LearnedScorer
from headrace.routing.share import ShareKeeper
from headrace.routing.tier_view import TierView

TIERS = ("small", "large")
COSTS = (1.0, 8.0)  # of 100 tokens; an answer has 50
SHARE = 0.3
RATED = (0.5, 0.7)  # share of answers that are rated, by tier: callers rate some tiers more often


@dataclass(frozen=True)
class Prompts:
    """The prompts that requests are drawn from.

    good, cost   [n, 2], of each tier; the outcome is from 0 to 1
    characters   [n], of the prompt
    chance       [n], probability of being drawn
    """

    scores: list[Score]
    features: Array
    good: Array
    cost: Array
    characters: Array
    chance: Array


@dataclass(frozen=True)
class Tried:
    """A candidate, with a name."""

    name: str
    candidate: Candidate


def read(folder: Path, seed: int = 0) -> tuple[Prompts, Prompts]:
    """Return the prompts to draw requests from, and others to fit a candidate to."""
    found = {
        name: family
        for name, family in families(folder).items()
        if name in ("mmlu", "rb_arc", "rb_mbpp") or name.startswith("nine/")
    }
    loaded, rng = scorer.load(), np.random.default_rng(seed)
    parts: list[list[tuple[Score, Array, tuple[float, float], int, float]]] = [[], []]
    for family in found.values():
        order = rng.permutation(len(family.prompts))
        for place, row in enumerate(order):
            prompt = family.prompts[row]
            good = (float(family.weak[row]), float(family.strong[row]))
            fit = place % 4 == 0
            parts[fit].append((loaded.score(prompt), scorer.read(prompt), good, len(prompt), 1 / len(order)))
    return _prompts(parts[0]), _prompts(parts[1])


def _prompts(rows: Sequence[tuple[Score, Array, tuple[float, float], int, float]]) -> Prompts:
    chance, characters = np.array([row[4] for row in rows]), np.array([row[3] for row in rows])
    return Prompts(
        [row[0] for row in rows],
        np.array([row[1] for row in rows]),
        np.array([row[2] for row in rows]),
        (0.5 + characters / 400)[:, None] * np.array(COSTS),
        characters,
        chance / chance.sum(),
    )


def candidates(prompts: Prompts, other: Prompts) -> list[Tried]:
    """Return the candidates: other shares, a refitted scorer, and a scorer that is always wrong."""
    model = scorer.load().model
    fitted = refit(model, other.features, other.good[:, 0], other.good[:, 1]).model
    wrong = replace(model, heads=-model.heads, head_bias=-model.head_bias, centre=-model.centre)
    rng = np.random.default_rng(1)
    drawn = rng.choice(len(prompts.chance), 20_000, p=prompts.chance)

    def tried(name: str, made: LearnedScorer, share: float) -> Tried:
        model = made.model
        gains = model.gains(prompts.features)
        scores = 1 / (1 + np.exp(-model.steepness * (gains - model.centre)))
        return Tried(name, Candidate(made, [0.0, float(np.quantile(scores[drawn], 1 - share))]))

    shipped = scorer.load()
    return [
        tried("the same scorer, 10 % large", shipped, 0.1),
        tried("the same scorer, 50 % large", shipped, 0.5),
        tried(f"refitted to {len(other.scores):,} other prompts, 30 %", LearnedScorer(fitted), SHARE),
        tried("gains negated, 30 %", LearnedScorer(wrong), SHARE),
    ]


@dataclass(frozen=True)
class Traffic:
    """The log of a run.

    rows      [n], of the prompts that were drawn
    chances   [n, 2], of each tier
    """

    log: list[Logged]
    rows: Places
    chances: Array

    def difference(self, result: Array, chosen: Sequence[int]) -> float:
        """Return the mean of *result* [prompts, 2] with other choices, less that of the logged policy."""
        of_rows = result[self.rows]
        logged = (of_rows * self.chances).sum(axis=1)
        return float((of_rows[np.arange(len(chosen)), list(chosen)] - logged).mean())


def traffic(prompts: Prompts, count: int, share: float, seed: int) -> Traffic:
    """Return the log of *count* requests, of which a *share* is explored."""
    rng = np.random.default_rng(seed)
    keeper = ShareKeeper([SHARE])
    log: list[Logged | records.Rated] = []
    rows = rng.choice(len(prompts.chance), count, p=prompts.chance)
    every = np.zeros((count, len(TIERS)))
    for number, row in enumerate(rows):
        score = prompts.scores[row]
        request = RoutingRequest(score.value, Hints())
        views = [TierView(name, mark) for name, mark in zip(TIERS, keeper.thresholds(), strict=True)]
        decision = explore(decide(score.value, Hints(), views), share, float(rng.random()))
        keeper.record(score.value, decision.place if decision.explored else decision.wanted)
        chances = dict(decision.chances) or {decision.place: 1.0}
        for place, chance in chances.items():
            every[number, place] = chance
        common = {"request": str(number), "time": float(number), "tier": decision.tier}
        result = {
            "kind": records.DECISION,
            "id": str(number),
            "outcome": "ok",
            "characters": int(prompts.characters[row]),
            "tokens": dict.fromkeys(records.TOKEN_KINDS, 0),
            "cost": float(prompts.cost[row, decision.place] * rng.gamma(4, 0.25)),
            "seconds": 1.0,
        }
        log.append(_parsed({**common, **result, **of_decision(request, score, decision)}))
        if rng.random() < RATED[decision.place]:
            good = float(rng.random() < prompts.good[row, decision.place])
            log.append(_parsed({"kind": records.RATING, **common, "quality": good, "source": "caller"}))
    return Traffic(join(log), rows, every)


def _parsed(row: dict[str, object]) -> Logged | records.Rated:
    return records.parse(json.loads(json.dumps(row)))


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--requests", type=int, default=4000)
    given = parser.parse_args()
    prompts, other = read(given.data)
    every = candidates(prompts, other)
    print(f"{given.requests} requests a run, {given.runs} runs, of {len(prompts.scores)} prompts")
    measures: dict[str, Callable[[Logged, str], float | None]] = {
        "quality": partial(replaying.quality, source="caller"),
        "cost": replaying.cost,
    }
    for share in (0.0, 0.05, 0.2):
        print(f"\nexplored: {share:.0%}")
        print(f"{'candidate':48} {'measure':8} {'truth':>8} {'estimate':>9} {'error':>7} {'IPS':>7} ", end="")
        print(f"{'SNIPS':>7} {'+-':>7} {'covered':>8} {'can tell':>9}")
        logs = [traffic(prompts, given.requests, share, seed) for seed in range(given.runs)]
        for one in every:
            replayed = [replaying.replay(run.log, one.candidate) for run in logs]
            for measure, result in measures.items():
                bounded = measure == "quality"
                compared = [compare(replaying.sample(again, result), bounded=bounded) for again in replayed]
                true = prompts.good if bounded else prompts.cost
                truths = [
                    run.difference(true, again.chosen) for run, again in zip(logs, replayed, strict=True)
                ]
                _print(one.name, measure, truths, compared)


def _print(name: str, measure: str, truths: Sequence[float], compared: Sequence[Comparison]) -> None:
    """Print one line of the table."""

    def error(values: Sequence[float]) -> float:
        squares = [(value - truth) ** 2 for value, truth in zip(values, truths, strict=True)]
        return math.sqrt(statistics.mean(squares))

    covered = [
        float(one.difference.low <= truth <= one.difference.high)
        for one, truth in zip(compared, truths, strict=True)
    ]
    print(
        f"{name:48} {measure:8} {statistics.mean(truths):8.4f} "
        f"{statistics.mean(one.difference.value for one in compared):9.4f} "
        f"{error([one.difference.value for one in compared]):7.4f} "
        f"{error([one.ips.value - one.logged.value for one in compared]):7.4f} "
        f"{error([one.snips.value - one.logged.value for one in compared]):7.4f} "
        f"{statistics.mean((one.difference.high - one.difference.low) / 2 for one in compared):7.4f} "
        f"{statistics.mean(covered):8.0%} {statistics.mean(not one.problem for one in compared):9.0%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
