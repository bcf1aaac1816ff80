"""Fit the scorer that Headrace ships: `python -m benchmarks.routing.train DATA [--out FILE]`.

The same data give the same bytes. DATA is described in `data.py`, the values that are set by hand in
`kinds.py`, and the results in the model card next to the artifact.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.data import SHIPPABLE, Family, families
from benchmarks.routing.kinds import (
    ASKS_MORE,
    CHORE,
    KINDS,
    LONGER,
    LONGER_LITTLE,
    OPEN,
    OPEN_PREFERRED,
    PREFERRED,
    TALK,
    TYPICAL,
    UNCLEAR,
    mathematics,
    open_prompts,
    puzzles,
    requests,
)
from benchmarks.routing.rewritings import SEEN
from benchmarks.routing.wordings import wordings
from headrace.routing.learning.fitting import ridge, softmax
from headrace.routing.scoring import prompt_features, scorer

Array = NDArray[np.float64]

_KIND_OF = {
    "mmlu": "choices",
    "steps": "word_problem",
    "nine/gsm8k": "word_problem",
    "nine/math": "mathematics",
    "nine/mbpp": "code",
    "nine/humaneval": "code",
    "nine/natural_questions": "fact",
    "nine/trivia": "fact",
    "nine/commonsense": "fact",
    "nine/openbook": "fact",
    "nine/arc": "fact",
    "nine/race": "passage",
}
_AT_MOST = 400  # rows of a family that the gate is fitted to
_RIDGE = 3000.0  # rows that the prior of a head counts as
_STEPS = 0.03  # gain per standard deviation of the expected solution steps
_TYPOS = [SEEN[f"typos: {name}"] for name in ("swapped", "dropped", "doubled")]
_STEEPNESS = 10.0  # log-odds per unit of gain: one standard deviation of gains is about half of one


def _features(prompts: Sequence[str]) -> Array:
    return np.array([scorer.read(prompt) for prompt in prompts])


@cache
def _made(kind: str, skipped: int | None) -> Array:
    """Return the features [rows, F] of our own prompts of a kind, each also with typing mistakes.

    See `fit` for *skipped*.
    """
    made = {"open": open_prompts, "reasoning": puzzles, "mathematics": mathematics}
    written = [text for place, text in enumerate(requests(kind)) if skipped is None or place % 2 != skipped]
    texts = (made[kind]() if kind in made else []) + written + wordings(kind)
    rng = random.Random(1)
    mistaken = [_TYPOS[place % len(_TYPOS)](text, rng) for place, text in enumerate(texts)]
    return _features(texts + mistaken)


_MADE = ("open", "reasoning", "mathematics", "code", "fact", "chore", "talk")  # kinds with prompts of our own


def fit(
    data: Mapping[str, Family], *, without: Collection[str] = (), skipped: int | None = None
) -> scorer.Model:
    """Fit a model of every objective to the shippable families of *data*, except those in *without*.

    skipped   0 or 1: leave out every second hand-written request, from this one; None: leave out none
    """
    usable = {
        name: family for name, family in data.items() if name.startswith(SHIPPABLE) and name not in without
    }
    gate, gate_bias = _gate(usable, skipped)
    count = len(prompt_features.NAMES)
    centres = {kind: _mean(usable, kind, count, skipped) for kind in KINDS}
    heads = {
        "choices": _taught(usable, "mmlu", LONGER),
        "word_problem": _named(LONGER),
        "mathematics": _taught(usable, "nine/math", LONGER_LITTLE),
        "code": _named(LONGER_LITTLE),
        "reasoning": _named(LONGER | ASKS_MORE),
        "fact": _named(LONGER | ASKS_MORE),
        "passage": _named(LONGER | ASKS_MORE),
        "open": _named(OPEN),
        "chore": _named(CHORE),
        "talk": _named(TALK),
        "unclear": _named(UNCLEAR),
    }
    if "steps" in usable:  # features that make word problems hard; length covers the rest
        features = usable["steps"].features
        steps = ridge(features, usable["steps"].gains, 300.0)[0]
        heads["word_problem"] += _STEPS / float((features @ steps).std()) * steps
    preferred = heads | {"open": _named(OPEN_PREFERRED)}
    levels = TYPICAL | PREFERRED
    return scorer.Model(
        kinds=KINDS,
        gate=gate,
        gate_bias=gate_bias,
        heads=np.array([heads[kind] for kind in KINDS]),
        head_bias=np.array([TYPICAL[kind] - float(centres[kind] @ heads[kind]) for kind in KINDS]),
        preferred=np.array([preferred[kind] for kind in KINDS]),
        preferred_bias=np.array([levels[kind] - float(centres[kind] @ preferred[kind]) for kind in KINDS]),
        steepness=_STEEPNESS,
        centre=0.195,
        made="python -m benchmarks.routing.train",
    )


def _taught(usable: Mapping[str, Family], name: str, prior: Mapping[str, float]) -> Array:
    """Return a head [F] fitted to a family's gains and shrunk to *prior*; *prior* if there is no family."""
    known = _named(prior)
    if name not in usable:
        return known
    return ridge(usable[name].features, usable[name].gains, _RIDGE, prior=known)[0]


def _gate(usable: Mapping[str, Family], skipped: int | None) -> tuple[Array, Array]:
    features: list[Array] = []
    labels: list[str] = []

    def teach(found: Array, kind: str) -> None:
        features.append(found)
        labels.extend([kind] * len(found))

    for name, kind in _KIND_OF.items():
        if name in usable:
            teach(usable[name].features[:_AT_MOST], kind)
    if "mmlu" in usable:  # the same questions in other layouts and with fewer choices
        asked = usable["mmlu"].prompts[_AT_MOST : 2 * _AT_MOST]
        teach(_features([_in_a_row(prompt) for prompt in asked[::2]]), "choices")
        teach(_features([_shorter(prompt) for prompt in asked[1::2]]), "choices")
    for kind in _MADE:
        teach(_made(kind, skipped), kind)
    if "arenahard" in usable:
        found = usable["arenahard"].features
        coding = (_column(found, "syntax") >= 0.5) | (_column(found, "programming") >= 0.75)
        teach(found[coding], "code")
        teach(found[~coding & (_column(found, "mathematics") < 0.75)], "open")
    places = np.array([KINDS.index(kind) for kind in labels])
    present = sorted(set(places.tolist()))
    weights, bias = softmax(np.vstack(features), np.searchsorted(present, places), len(present))
    gate = np.zeros((len(KINDS), weights.shape[1]))
    gate_bias = np.full(len(KINDS), -20.0)  # a kind without prompts is never chosen
    gate[present], gate_bias[present] = weights, bias
    choices = KINDS.index("choices")
    if choices not in present:  # its form alone decides
        gate[choices], gate_bias[choices] = _named({"options": 16.0}), -8.0
    for kind in ("chore", "talk"):  # their prompts are short, but a short question with choices is neither
        gate[KINDS.index(kind), prompt_features.NAMES.index("options")] = -8.0
    unclear = KINDS.index("unclear")  # has no prompts: the doubt about the language alone decides
    gate[:, prompt_features.NAMES.index("doubt")] = 0.0
    gate[unclear], gate_bias[unclear] = _named({"doubt": 16.0}), -8.0
    return gate, gate_bias


def _in_a_row(prompt: str) -> str:
    return re.sub(r"\n([A-D])\. ", r" (\1) ", prompt)


def _shorter(prompt: str) -> str:
    """Return a short question with two of the four choices of *prompt*, in another layout."""
    kept = re.sub(r"\n[C-D]\. [^\n]*", "", prompt)
    return "Which one?" + kept[kept.find("\nA. ") :].replace("A. ", "A) ").replace("B. ", "B) ")


def _mean(usable: Mapping[str, Family], kind: str, count: int, skipped: int | None) -> Array:
    """Return the mean features [F] of a kind's prompts, which get its typical gain."""
    found = [usable[name].features for name in usable if _KIND_OF.get(name) == kind]
    if kind in _MADE and kind not in _KIND_OF.values():
        found = [_made(kind, skipped)]
    if kind == "open":
        found += [usable["arenahard"].features] if "arenahard" in usable else []
    if kind == "unclear":
        found = [_named({"length": 0.2})[None, :]]
    means: Array = np.mean([family.mean(axis=0) for family in found], axis=0) if found else np.zeros(count)
    return means


def _column(features: Array, name: str) -> Array:
    column: Array = features[:, prompt_features.NAMES.index(name)]
    return column


def _named(weights: Mapping[str, float]) -> Array:
    """Return weights [F] from the weights of some named features."""
    return np.array([weights.get(name, 0.0) for name in prompt_features.NAMES])


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dev/ and train/")
    parser.add_argument(
        "--out", type=Path, default=scorer.SHIPPED, help="where to write (default: what is shipped)"
    )
    arguments = parser.parse_args()
    model = fit(families(arguments.data))
    scorer.save(model, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
