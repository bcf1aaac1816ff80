"""Measure the choice by chance of success: `python -m benchmarks.routing.success DATA`.

The tiers are models of LLMRouter's nine, whose outcomes on the same prompts are known. Labels are drawn as a
router would get them, one tier per prompt, and figures are of prompts that nothing was fitted to: one half of
the rows gives labels, the other half is measured. DATA is described in `data.py`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.data import _origin
from headrace.router.costs.budget import DAY, Budget
from headrace.routing.learning import success
from headrace.routing.learning.calibrated import calibrated
from headrace.routing.learning.success import Outcomes
from headrace.routing.learning.weights import bounded, recency
from headrace.routing.scoring import scorer
from headrace.routing.success.choosing import Weighed
from headrace.routing.success.heads import Heads

Array = NDArray[np.float64]
Places = NDArray[np.int64]

KINDS = len(scorer.load().model.kinds)
WEIGHT = 0.1  # as --cost-weight
# Name of the experiment: the tiers by the beginnings of their models' names, and the cost of a call.
SETS: dict[str, dict[str, float]] = {
    "ordered: 7B, 9B, 51B": {"mistral-7b": 0.1, "gemma-2-9b": 0.2, "llama-3.1-nemotron-51b": 1.0},
    "unordered: 7B, 7B for code": {"mistral-7b": 0.5, "codegemma-7b": 0.5},
    "unordered: 7B, 7B for code, 9B": {"mistral-7b": 0.3, "codegemma-7b": 0.3, "gemma-2-9b": 0.6},
    "unordered: 7B, 9B": {"qwen2.5-7b": 0.5, "gemma-2-9b": 0.5},
}


@dataclass(frozen=True)
class Traffic:
    """Prompts [P] with the outcomes of T tiers.

    inputs   [P, F + K], of the heads
    gains    [P], which order the prompts by score
    good     [P, T]
    family   [P]
    costs    [T], of a call
    """

    inputs: Array
    gains: Array
    good: Array
    family: NDArray[np.str_]
    costs: Array

    def only(self, rows: Places) -> Traffic:
        """Return the prompts at these places."""
        return Traffic(self.inputs[rows], self.gains[rows], self.good[rows], self.family[rows], self.costs)

    def halves(self, seed: int) -> tuple[Traffic, Traffic]:
        """Return two random halves."""
        order = np.random.default_rng(seed).permutation(len(self.gains))
        return self.only(order[::2]), self.only(order[1::2])


def traffic_of(folder: Path) -> Callable[[dict[str, float]], Traffic]:
    """Return a function that returns the traffic of a set of tiers."""
    with gzip.open(folder / "train" / "llmrouter_9models.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    model = scorer.load().model
    features = np.array([scorer.read(row["prompt"]) for row in rows])
    inputs, gains = np.hstack([features, model.kinds_of(features)]), model.gains(features)
    family = np.array([_origin(row) for row in rows])

    def of(tiers: dict[str, float]) -> Traffic:
        names = [next(name for name in rows[0]["scores"] if name.startswith(tier)) for tier in tiers]
        good = np.array([[row["scores"][name] for name in names] for row in rows])
        return Traffic(inputs, gains, good, family, np.array(list(tiers.values())))

    return of


def labels(traffic: Traffic, count: int, seed: int) -> Outcomes:
    """Return outcomes of *count* prompts, each answered by one tier that was drawn at random."""
    rng = np.random.default_rng(seed)
    prompt = rng.permutation(len(traffic.gains))[:count]
    tier = rng.integers(0, len(traffic.costs), len(prompt))
    return Outcomes(
        inputs=traffic.inputs,
        prompt=prompt,
        tier=tier,
        good=traffic.good[prompt, tier],
        weight=np.ones(len(prompt)),
        tokens=np.full(len(prompt), np.nan),
    )


def fitted(outcomes: Outcomes, tiers: int) -> Heads:
    """Return heads that were fitted to *outcomes*."""
    return success.fit([str(tier) for tier in range(tiers)], outcomes, kinds=KINDS).heads


def chosen(good: Array, costs: Array, weight: float) -> Places:
    """Return the best tier of each prompt for estimates [P, T], as the router chooses it."""
    places = range(len(costs))
    return np.array(
        [Weighed(tuple(row), tuple(costs.tolist()), weight).best(places) for row in good.tolist()]
    )


def by_score(traffic: Traffic, like: Places) -> Places:
    """Return the tiers by score with the same number of calls for each tier as *like*.

    The tiers are in the order of their mean quality, which is the best order that a score could have.
    """
    order = np.argsort(traffic.good.mean(axis=0))
    counts = np.bincount(like, minlength=len(order))[order]
    places = np.empty(len(like), dtype=np.int64)
    places[np.argsort(traffic.gains, kind="stable")] = np.repeat(order, counts)
    return places


def quality(traffic: Traffic, places: Places) -> float:
    """Return the mean outcome with these tiers."""
    return float(traffic.good[np.arange(len(places)), places].mean())


def _table(title: str, *headings: str) -> None:
    """Begin a table with a title."""
    print(f"\n{title}\n\n| {' | '.join(headings)} |\n|{'---|' * len(' | '.join(headings).split(' | '))}")


def _row(label: str, found: Sequence[Sequence[float]]) -> None:
    """Print a row of a table: a label, and the means of what was found with each seed."""
    print(f"| {label} | " + " | ".join(f"{value:.3f}" for value in np.mean(found, axis=0)) + " |", flush=True)


def cold_start(of: Callable[[dict[str, float]], Traffic], seeds: Sequence[int]) -> None:
    """Print the figures for 0, 50, 200 and 1,000 labels."""
    _table(
        "Cold start. Costs and numbers of calls are those of the choice by success",
        *(
            "tiers | labels",
            "Brier",
            "of true base rates",
            "calibration error",
            "by success",
            "cost",
            "by score",
            "at random",
            "best single tier",
            "true mean of each family",
        ),
    )
    for name, tiers in SETS.items():
        every = of(tiers)
        for count in (0, 50, 200, 1000):
            found = []
            for seed in seeds:
                known, unseen = every.halves(seed)
                if count:
                    good = fitted(labels(known, count, seed), len(tiers)).good(unseen.inputs)
                else:  # nothing is known: the cheapest
                    good = np.full(unseen.good.shape, 0.5)
                places = chosen(good, unseen.costs, WEIGHT)
                found.append(_figures(unseen, good, places))
            _row(f"{name} | {count:,}", found)


def _figures(unseen: Traffic, good: Array, places: Places) -> list[float]:
    flat, actual = good.ravel(), unseen.good.ravel()
    base = unseen.good.mean(axis=0)
    shares = np.bincount(places, minlength=len(base)) / len(places)
    best = chosen(np.tile(base, (len(places), 1)), unseen.costs, WEIGHT)
    families = np.array([unseen.good[unseen.family == each].mean(axis=0) for each in unseen.family])
    errors = [calibrated(good[:, tier], unseen.good[:, tier]).error for tier in range(len(base))]
    return [
        float(((flat - actual) ** 2).mean()),
        float(((base - unseen.good) ** 2).mean()),
        float(np.mean(errors)),
        quality(unseen, places),
        float(unseen.costs[places].mean()),
        quality(unseen, by_score(unseen, places)),
        float(shares @ base),
        quality(unseen, best),
        quality(unseen, chosen(families, unseen.costs, WEIGHT)),
    ]


def curve(of: Callable[[dict[str, float]], Traffic], seeds: Sequence[int]) -> None:
    """Print the calibration curve of each tier, with 1,000 labels."""
    name, tiers = next(iter(SETS.items()))
    _table(f"{name}, 1,000 labels", *("tier", "Brier", "of base rate", "estimated : actual, by fifths"))
    every = of(tiers)
    for place, tier in enumerate(tiers):
        expected, actual = [], []
        for seed in seeds:
            known, unseen = every.halves(seed)
            heads = fitted(labels(known, 1000, seed), len(tiers))
            expected.append(heads.good(unseen.inputs)[:, place])
            actual.append(unseen.good[:, place])
        found = calibrated(np.concatenate(expected), np.concatenate(actual))
        bins = ", ".join(f"{part.expected:.2f} : {part.actual:.2f}" for part in found.bins)
        print(f"| {tier} | {found.brier:.3f} | {found.base:.3f} | {bins} |", flush=True)


def unseen_families(of: Callable[[dict[str, float]], Traffic], seeds: Sequence[int]) -> None:
    """Print the figures for families without any labels: each of them left out in turn."""
    _table(
        "Families without labels: each left out in turn, 1,000 labels of the others",
        *("tiers", "Brier", "of the labels' base rates", "by success", "by score, same calls"),
    )
    for name, tiers in SETS.items():
        every, found = of(tiers), []
        for family in sorted(set(every.family.tolist())):
            left = every.only(np.flatnonzero(every.family == family))
            rest = every.only(np.flatnonzero(every.family != family))
            for seed in seeds[:2]:
                outcomes = labels(rest, 1000, seed)
                good = fitted(outcomes, len(tiers)).good(left.inputs)
                base = np.array([outcomes.good[outcomes.tier == tier].mean() for tier in range(len(tiers))])
                places = chosen(good, left.costs, WEIGHT)
                scored = quality(left, by_score(left, places))
                found.append(
                    [
                        ((good - left.good) ** 2).mean(),
                        ((base - left.good) ** 2).mean(),
                        quality(left, places),
                        scored,
                    ]
                )
        _row(name, found)


def drift(of: Callable[[dict[str, float]], Traffic], seeds: Sequence[int]) -> None:
    """Print what half-lives do if the best tier becomes worse, and if the kinds of prompts change."""
    name, tiers = "unordered: 7B, 9B", SETS["unordered: 7B, 9B"]
    every = of(tiers)
    _table(
        f"{name}; 1,000 labels in 60 days; from day 50 on, the better tier answers half as well; on day 60",
        *("half-life", "Brier", "by success", "Brier, unchanged tier", "by success, unchanged tier"),
    )
    for half_life in (1e9, 90.0, 30.0, 10.0, 3.0):
        found = []
        for seed in seeds:
            known, unseen = every.halves(seed)
            best = int(every.good.mean(axis=0).argmax())
            row = []
            for worse in (True, False):
                outcomes = labels(known, 1000, seed)
                day = np.linspace(0, 60, len(outcomes.good))
                rng = np.random.default_rng(seed)
                now = unseen.good.copy()
                good = outcomes.good.copy()
                if worse:
                    now[:, best] *= rng.random(len(now)) < 0.5
                    broken = (outcomes.tier == best) & (day > 50)
                    good[broken] *= rng.random(int(broken.sum())) < 0.5
                aged = _weighted(outcomes, good, recency(60 - day, half_life))
                expected = fitted(aged, len(tiers)).good(unseen.inputs)
                places = chosen(expected, unseen.costs, WEIGHT)
                row += [((expected - now) ** 2).mean(), now[np.arange(len(places)), places].mean()]
            found.append(row)
        label = "none" if half_life > 1e6 else f"{half_life:.0f} days"
        _row(label, found)
    _other_kinds(of, seeds)


def _other_kinds(of: Callable[[dict[str, float]], Traffic], seeds: Sequence[int]) -> None:
    name, tiers = "unordered: 7B, 7B for code", SETS["unordered: 7B, 7B for code"]
    every = of(tiers)
    _table(
        f"{name}; the share of code in the traffic changes; 400 labels",
        *(
            "share of code: labels, traffic",
            "Brier",
            "by success",
            "by score, same calls",
            "best single tier",
        ),
    )
    for before, after in ((0.1, 0.1), (0.1, 0.6), (0.6, 0.6), (0.6, 0.1), (0.0, 0.6)):
        found = []
        for seed in seeds:
            known, unseen = every.halves(seed)
            rng = np.random.default_rng(seed)
            trained = known.only(_mixed(known, before, 500, rng))
            served = unseen.only(_mixed(unseen, after, 600, rng))
            good = fitted(labels(trained, 400, seed), len(tiers)).good(served.inputs)
            places = chosen(good, served.costs, WEIGHT)
            single = served.good.mean(axis=0).max()
            found.append(
                [
                    ((good - served.good) ** 2).mean(),
                    quality(served, places),
                    quality(served, by_score(served, places)),
                    single,
                ]
            )
        _row(f"{before:.0%}, {after:.0%}", found)


def _mixed(traffic: Traffic, share: float, count: int, rng: np.random.Generator) -> Places:
    code = np.isin(traffic.family, ["mbpp", "humaneval"])
    wanted = min(round(share * count), int(code.sum()))
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(code), wanted, replace=False),
            rng.choice(np.flatnonzero(~code), count - wanted, replace=False),
        ]
    )


def _weighted(outcomes: Outcomes, good: Array, weight: Array) -> Outcomes:
    return replace(outcomes, good=good, weight=weight)


def poison(of: Callable[[dict[str, float]], Traffic], seeds: Sequence[int]) -> None:
    """Print the effect of one tenant that reports the opposite of the truth."""
    tiers = SETS["unordered: 7B, 9B"]
    every = of(tiers)
    _table(
        "unordered: 7B, 9B; ten honest tenants with 60 outcomes each, and one that reverses its own",
        *("reversed outcomes", "Brier, bounded", "by success", "Brier, not bounded", "by success"),
    )
    for bad in (0, 60, 300, 1500):
        found = []
        for seed in seeds:
            known, unseen = every.halves(seed)
            outcomes = labels(known, 600 + bad, seed)
            good = outcomes.good.copy()
            good[600:] = 1 - good[600:]
            tenants = [f"honest {row % 10}" if row < 600 else "bad" for row in range(len(good))]
            row = []
            for most in (0.2, 1.0):
                weight = np.ones(len(good))
                for tier in range(len(tiers)):
                    of_tier = np.flatnonzero(outcomes.tier == tier)
                    weight[of_tier] = bounded(weight[of_tier], [tenants[at] for at in of_tier], most=most)
                heads = fitted(_weighted(outcomes, good, weight), len(tiers))
                expected = heads.good(unseen.inputs)
                places = chosen(expected, unseen.costs, WEIGHT)
                row += [((expected - unseen.good) ** 2).mean(), quality(unseen, places)]
            found.append(row)
        _row(f"{bad:,}", found)


def budget(of: Callable[[dict[str, float]], Traffic]) -> None:
    """Print what a day of requests costs under a budget, for traffic of several shapes."""
    tiers = SETS["ordered: 7B, 9B, 51B"]
    known, unseen = of(tiers).halves(0)
    good = fitted(labels(known, 1000, 0), len(tiers)).good(unseen.inputs).tolist()
    cheapest, dearest = unseen.costs.min(), unseen.costs.max()
    _table(
        f"20,000 requests a day, the second of two days; the cheapest tier costs {cheapest / dearest:.0%}",
        *("traffic", "budget, of always the largest tier", "spent, of the budget", "by success"),
    )
    shapes = {
        "even": np.linspace(0, 1, 20_000, endpoint=False),
        "sixteen hours": np.linspace(1 / 3, 1, 20_000, endpoint=False),
        "eight hours in the morning": np.linspace(1 / 6, 1 / 2, 20_000, endpoint=False),
    }
    for shape, moments in shapes.items():
        for part in (0.15, 0.3, 0.6, 2.0):
            per_day = part * dearest * len(moments)
            keeper = Budget(per_day, 0.0)
            spent, outcome = 0.0, 0.0
            rng = np.random.default_rng(1)
            for day in range(2):
                spent, outcome = 0.0, 0.0
                for moment, row in zip(moments, rng.integers(0, len(good), len(moments)), strict=True):
                    now = (day + moment) * DAY
                    weight = WEIGHT * keeper.factor(now) / dearest
                    place = Weighed(tuple(good[row]), tuple(unseen.costs.tolist()), weight).best(
                        range(len(tiers))
                    )
                    cost = float(unseen.costs[place])
                    keeper.spend(cost, now)
                    spent += cost
                    outcome += unseen.good[row, place]
            print(
                f"| {shape} | {part:.0%} | {spent / per_day:.1%} | {outcome / len(moments):.3f} |", flush=True
            )


def latency(of: Callable[[dict[str, float]], Traffic], folder: Path) -> None:
    """Print the CPU time of scoring with and without estimates."""
    tiers = SETS["ordered: 7B, 9B, 51B"]
    heads = fitted(labels(of(tiers), 1000, 0), len(tiers))
    plain = scorer.load()
    with_tiers = scorer.LearnedScorer(replace(plain.model, tiers=heads))
    with gzip.open(folder / "dev" / "mmlu_dev1500.jsonl.gz", "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    times: dict[str, list[float]] = {"score": [], "score and estimates": []}
    for prompt in prompts:
        for name, each in (("score", plain), ("score and estimates", with_tiers)):
            began = time.thread_time()
            each.score(prompt)
            times[name].append(1000 * (time.thread_time() - began))
    print()
    for name, found in times.items():
        print(f"{name}: p50 {np.percentile(found, 50):.3f} ms, p99 {np.percentile(found, 99):.3f} ms of CPU")


def main() -> None:
    """Print the tables, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dev/ and train/")
    parser.add_argument("--seeds", type=int, default=10, help="repetitions of each experiment")
    arguments = parser.parse_args()
    of, seeds = traffic_of(arguments.data), range(arguments.seeds)
    cold_start(of, seeds)
    curve(of, seeds[:4])
    unseen_families(of, seeds)
    drift(of, seeds)
    poison(of, seeds)
    budget(of)
    latency(of, arguments.data)


if __name__ == "__main__":
    main()
