"""Measure the score on mixtures of unseen families: `python -m benchmarks.routing.mixtures DATA`.

One figure for many mixtures says more about the order *between* kinds of prompts than one mixture does. There
are two sets of mixtures:

- random: six families of the pool with 100 to 400 prompts each. All six are left out of the fit, and with
  them every family of the same kind from elsewhere (GSM8K of other models, for example).
- known kinds: five families of which none trained the model, while other families of the same kinds did; MMLU
  is left out in folds.

Each mixture is measured alone and with open requests added. There are no preference labels with a licence, so
the open requests are simulated: each gains 0.5, as if the strong model won three comparisons in four whatever
the request is. The figure shows where a score puts such requests among others, and nothing about their order.
They are of two origins: instructions of users in FLASK, which train nothing, and the half of our own requests
that this fit left out. A family whose outcomes are of small models only is scaled to the published mean gain.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.data import Family, families
from benchmarks.routing.kinds import requests
from benchmarks.routing.train import fit
from headrace.routing.learning.tradeoff import folds, quality
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import Objective

Array = NDArray[np.float64]

_POOL = (
    *("mmlu", "rb_arc", "rb_mbpp", "nine/gsm8k", "seven/gsm8k-train", "nine/math", "nine/mbpp"),
    *("nine/humaneval", "nine/race", "nine/natural_questions", "nine/trivia", "nine/gpqa", "nine/arc"),
    *("nine/openbook", "seven/MATH_prealgebra", "nine/zebra"),
)  # fmt: skip
_ALIKE = (
    {"rb_mbpp", "nine/mbpp", "nine/humaneval"},
    {"rb_arc", "nine/arc"},
    {"nine/gsm8k", "seven/gsm8k-train", "steps"},
    {"nine/math", "seven/MATH_prealgebra"},
    {"nine/natural_questions", "nine/trivia"},
)
_KNOWN = ("mmlu", "rb_arc", "rb_mbpp", "seven/gsm8k-train", "seven/MATH_prealgebra")
_SCALED = {"seven/gsm8k-train": 0.20, "seven/MATH_prealgebra": 0.25}  # mean gain
_USERS = (  # tasks of FLASK
    *("Self-instruct", "Wizardlm", "Koala", "Shp", "Lfqa_summary", "Lfqa_discourse", "Haiku generation"),
    *("Writingprompts", "Factscore", "Hhh-alignment", "Gpt-4 paper", "Prosocialdialog", "Finegrained-rlhf"),
    *("Pocketdoc/rucaibox-story-generation-alpaca", "Hh-rlhf"),
)
_PREFERRED = 0.5  # gain of an open request: 0.75 - 0.25
_OPEN_ROWS = 200
_MIXTURES = 40
_ORIGINS = ("none", "users in FLASK", "our own")


def prepared(folder: Path) -> dict[str, Family]:
    """Return the families, small models' gains scaled, and the open requests of users as `users`."""
    data = families(folder)
    for name, mean in _SCALED.items():
        failed = 1 - data[name].weak
        data[name] = replace(data[name], weak=1 - failed * mean / failed.mean())
    chosen = data["flask"].only(np.flatnonzero(np.isin(data["flask"].groups, _USERS)))
    data["users"] = replace(chosen, weak=np.full(len(chosen.weak), 1 - _PREFERRED))
    return data


@cache
def own(half: int) -> Family:
    """Return the hand-written open requests that a fit without this half has not seen."""
    prompts = requests("open")[half::2]
    gains = np.full(len(prompts), _PREFERRED)
    return Family(prompts, 1 - gains, np.ones(len(prompts)), [""] * len(prompts))


def drawn(seed: int) -> tuple[list[str], list[int]]:
    """Return six families of the pool and how many prompts of each are used."""
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.choice(_POOL, 6, replace=False)]
    return names, [int(size) for size in rng.choice([100, 200, 400], 6)]


def left_out(names: Sequence[str]) -> set[str]:
    """Return the families that no model for a mixture of *names* may have seen."""
    return set(names).union(*(alike for alike in _ALIKE if alike & set(names)))


def measured(parts: Sequence[tuple[Family, Array]]) -> tuple[float, float, float]:
    """Return the APGR of the scores, of the length, and of the true mean gain of each family."""
    gains = np.concatenate([family.gains for family, _ in parts])
    nothing = np.zeros(len(gains))
    by_length = [len(prompt) for family, _ in parts for prompt in family.prompts]
    by_family = np.concatenate([np.full(len(part.weak), part.gains.mean()) for part, _ in parts])
    orders = (np.concatenate([scores for _, scores in parts]), np.array(by_length, float), by_family)
    score, length, known = (quality(order, nothing, gains).apgr for order in orders)
    return score, length, known


def random_mixture(
    data: Mapping[str, Family], seed: int
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Return the APGRs of a random mixture by objective and origin of the open requests."""
    names, sizes = drawn(seed)
    model = fit(data, without=left_out(names), skipped=seed % 2)
    rng = np.random.default_rng(seed)
    parts = []
    for name, size in zip(names, sizes, strict=True):
        parts.append(data[name].only(rng.permutation(len(data[name].weak))[:size]))
    found = {}
    for objective in get_args(Objective):
        aimed = model.aimed(objective)
        checked = [(part, aimed.gains(part.features)) for part in parts]
        for origin in _ORIGINS:
            extra = _open(data, origin, seed % 2, seed)
            added = [(extra, aimed.gains(extra.features))] if extra else []
            found[objective, origin] = measured(checked + added)
    return found


def known_kinds(data: Mapping[str, Family], half: int) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Return the APGRs of the mixture of known kinds by objective and origin of the open requests."""
    mmlu = data["mmlu"]
    whole = fit(data, skipped=half)
    in_folds = [
        (part, fit({**data, "mmlu": mmlu.only(np.setdiff1d(np.arange(len(mmlu.weak)), part))}, skipped=half))
        for part in folds(len(mmlu.weak), 5, seed=0)
    ]
    found = {}
    for objective in get_args(Objective):
        expected = np.zeros(len(mmlu.weak))
        for part, model in in_folds:
            expected[part] = model.aimed(objective).gains(mmlu.features[part])
        aimed = whole.aimed(objective)
        checked = []
        for name in _KNOWN:
            rows = np.random.default_rng(1).permutation(len(data[name].weak))[:400]
            sample = data[name].only(rows)
            checked.append((sample, expected[rows] if name == "mmlu" else aimed.gains(sample.features)))
        for origin in _ORIGINS:
            extra = _open(data, origin, half, 1)
            added = [(extra, aimed.gains(extra.features))] if extra else []
            found[objective, origin] = measured(checked + added)
    return found


def _open(data: Mapping[str, Family], origin: str, half: int, seed: int) -> Family | None:
    """Return open requests to add to a mixture."""
    if origin == "none":
        return None
    family = data["users"] if origin == "users in FLASK" else own(half)
    rng = np.random.default_rng(seed)
    return family.only(np.resize(rng.permutation(len(family.weak)), _OPEN_ROWS))


def _print_kinds(data: Mapping[str, Family]) -> None:
    """Print what models that have not seen the open requests make of them."""
    print("\n| open requests | rows | score, correctness | both | preference | P(open) | P(chore) |")
    print("|---|---|---|---|---|---|---|")
    models = [fit(data, skipped=half) for half in (0, 1)]
    for name, parts in (("users in FLASK", [data["users"]] * 2), ("our own", [own(0), own(1)])):
        cells = []
        for objective in get_args(Objective):
            scored = [scorer.LearnedScorer(model.aimed(objective)) for model in models]
            values = [
                each.score(prompt).value
                for each, part in zip(scored, parts, strict=True)
                for prompt in part.prompts
            ]
            cells.append(f"{np.mean(values):.2f}")
        shares = [model.kinds_of(part.features) for model, part in zip(models, parts, strict=True)]
        means = np.concatenate(shares).mean(axis=0)
        cells += [f"{means[models[0].kinds.index(kind)]:.2f}" for kind in ("open", "chore")]
        print(f"| {name} | {len({p for part in parts for p in part.prompts})} | {' | '.join(cells)} |")


def main() -> None:
    """Print the tables, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dev/ and train/")
    data = prepared(parser.parse_args().data)
    sets = {
        f"{_MIXTURES} random mixtures of six": [random_mixture(data, seed) for seed in range(_MIXTURES)],
        "five families of known kinds": [known_kinds(data, half) for half in (0, 1)],
    }
    print("| APGR | open requests | correctness | both | preference | length | mean gain of each family |")
    print("|---|---|---|---|---|---|---|")
    for name, found in sets.items():
        for origin in _ORIGINS:
            by_objective = [np.mean([each[o, origin] for each in found], axis=0) for o in get_args(Objective)]
            cells = [f"{row[0]:.3f}" for row in by_objective]
            cells += [f"{by_objective[0][1]:.3f}", f"{by_objective[0][2]:.3f}"]
            print(f"| {name} | {origin} | {' | '.join(cells)} |", flush=True)
    _print_kinds(data)


if __name__ == "__main__":
    main()
