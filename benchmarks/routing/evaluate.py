"""Measure the scorer and its alternatives: `python -m benchmarks.routing.evaluate DATA`.

All figures are on prompts that the model was not fitted to: a family is left out as a whole (`unseen`), or in
folds if the shipped model was fitted to a part of it (`folds`). The alternatives are the length of the
prompt, and LiteLLM's complexity router if `--litellm PYTHON` names an interpreter that has it. The outcomes
under `nine/` and `seven/` are of other models than the rest, and show how well an order transfers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.data import Family, families
from benchmarks.routing.train import fit
from headrace.routing.learning.fitting import refit
from headrace.routing.learning.tradeoff import folds, quality
from headrace.routing.scoring import scorer

Array = NDArray[np.float64]

_MIXTURE = ("mmlu", "rb_arc", "rb_mbpp", "nine/gsm8k", "nine/math")
_LABELLED = 200  # outcomes for a refit
_PARTS = 5

_LITELLM = """
import json, sys
from litellm.router_strategy.complexity_router.complexity_router import ComplexityRouter
router = ComplexityRouter(model_name="x", litellm_router_instance=None)
print(json.dumps([router.classify(prompt)[1] for prompt in json.load(sys.stdin)]))
"""


def held_out(data: Mapping[str, Family], name: str) -> tuple[str, Array]:
    """Return how *name* was held out, and the gains [rows] that a model fitted without it expects."""
    family = data[name]
    if name != "mmlu":
        return "unseen", fit(data, without=[name]).aimed().gains(family.features)
    expected = np.zeros(len(family.weak))
    for part in folds(len(family.weak), _PARTS, seed=0):
        rest = np.setdiff1d(np.arange(len(family.weak)), part)
        expected[part] = fit({**data, name: family.only(rest)}).aimed().gains(family.features[part])
    return "folds", expected


def by_subject(data: Mapping[str, Family], name: str) -> Array:
    """Like `held_out`, but leave out whole subjects at a time."""
    family = data[name]
    groups = np.array(family.groups)
    expected = np.zeros(len(groups))
    for part in folds(len(set(family.groups)), _PARTS, seed=0):
        left = np.isin(groups, np.array(sorted(set(family.groups)))[part])
        model = fit({**data, name: family.only(np.flatnonzero(~left))}).aimed()
        expected[left] = model.gains(family.features[left])
    return expected


def after_labels(model: scorer.Model, family: Family, seeds: Sequence[int]) -> tuple[float, float]:
    """Return the mean APGR on the rest of *family* before and after a refit to 200 of its outcomes."""
    features = family.features
    found = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(family.weak))
        seen, rest = order[:_LABELLED], order[_LABELLED:]
        fitted = refit(model, features[seen], family.weak[seen], family.strong[seen]).model
        weak, strong = family.weak[rest], family.strong[rest]
        found.append(
            [
                quality(model.gains(features[rest]), weak, strong).apgr,
                quality(fitted.gains(features[rest]), weak, strong).apgr,
            ]
        )
    before, after = np.mean(found, axis=0)
    return float(before), float(after)


def latency(prompts: Sequence[str]) -> tuple[float, float]:
    """Return p50 and p99 of the CPU time of scoring one prompt, in milliseconds."""
    shipped = scorer.load()
    times = []
    for prompt in prompts:
        began = time.thread_time()
        shipped.score(prompt)
        times.append(1000 * (time.thread_time() - began))
    return float(np.percentile(times, 50)), float(np.percentile(times, 99))


def litellm_scores(python: str, prompts: Sequence[str]) -> Array:
    """Return LiteLLM's complexity score of each prompt."""
    done = subprocess.run(
        [python, "-c", _LITELLM], input=json.dumps(prompts), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return np.array(json.loads(done.stdout.strip().splitlines()[-1]))


def _told(name: str, how: str, scores: Array, family: Family) -> None:
    found = quality(scores, family.weak, family.strong)
    print(
        f"| {name} | {len(family.weak)} | {how} | {found.apgr:.3f} | {found.cpt50:.1f} | {found.cpt80:.1f} |",
        flush=True,
    )


def main() -> None:
    """Print the tables, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dev/ and train/")
    parser.add_argument("--litellm", default="", help="python that can import litellm")
    arguments = parser.parse_args()
    data = families(arguments.data)
    print("| family | rows | score | APGR | CPT50 | CPT80 |\n|---|---|---|---|---|---|")
    expected = {}
    names = ["mmlu", "rb_arc", "rb_mbpp", "nine/gsm8k", "nine/math", "seven/gsm8k-train", "flask"]
    for name in names:
        family = data[name]
        how, expected[name] = held_out(data, name)
        _told(name, f"ours, {how}", expected[name], family)
        if name == "mmlu":
            _told(name, "ours, subjects unseen", by_subject(data, name), family)
        _beside(name, family, arguments.litellm)
    mixture, scores = _mixed(data, expected)
    _told("mixture", "ours, mmlu in folds", scores, mixture)
    without = fit(data, without=["mmlu"]).aimed().gains(data["mmlu"].features)
    _told("mixture", "ours, unseen", _mixed(data, {**expected, "mmlu": without})[1], mixture)
    _beside("mixture", mixture, arguments.litellm)
    print(f"\n| family | APGR unseen | after {_LABELLED} labels |\n|---|---|---|")
    for name in ("mmlu", "rb_arc", "nine/gsm8k", "nine/math", "nine/race", "seven/gsm8k-train", "flask"):
        before, after = after_labels(fit(data, without=[name]).aimed(), data[name], range(10))
        print(f"| {name} | {before:.3f} | {after:.3f} |", flush=True)
    prompts = [prompt for name in names for prompt in data[name].prompts[:300]]
    middle, late = latency(prompts)
    print(f"\n{len(prompts)} prompts scored: p50 {middle:.2f} ms, p99 {late:.2f} ms of CPU")


def _beside(name: str, family: Family, python: str) -> None:
    _told(name, "length", np.array([len(prompt) for prompt in family.prompts], dtype=np.float64), family)
    if python:
        _told(name, "LiteLLM", litellm_scores(python, family.prompts), family)


def _mixed(data: Mapping[str, Family], expected: Mapping[str, Array]) -> tuple[Family, Array]:
    """Return the families of the mixture, at most 400 rows of each, and their scores."""

    prompts: list[str] = []
    weak, strong, scores = [], [], []
    for name in _MIXTURE:
        rows = np.random.default_rng(1).permutation(len(data[name].weak))[:400]
        part = data[name].only(rows)
        prompts += part.prompts
        weak.append(part.weak)
        strong.append(part.strong)
        scores.append(expected[name][rows])
    mixture = Family(prompts, np.concatenate(weak), np.concatenate(strong), [""] * len(prompts))
    return mixture, np.concatenate(scores)


if __name__ == "__main__":
    main()
