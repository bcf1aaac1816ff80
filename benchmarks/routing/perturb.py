"""Measure how often a harmless rewriting changes the tier: `python -m benchmarks.routing.perturb DATA`.

A decision flips if a prompt and its rewriting are on different sides of the score that separates the
hardest 30 % (or 50 %) of the prompts. The prompts are a fixed sample of several families of DATA, equally
many of each. The scorer is the shipped one, or that of `--artifact`. A rewriting counts only where it
changes the text.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.data import families
from benchmarks.routing.rewritings import SEEN, Rewriting
from benchmarks.routing.rewritings_checked import CHECKED
from benchmarks.routing.rewritings_later import LATER
from benchmarks.routing.rewritings_unseen import UNSEEN
from headrace.routing.scoring import scorer

Array = NDArray[np.float64]

SHARES = (0.3, 0.5)  # of the prompts that go to the large tier
PARAPHRASES = Path(__file__).with_name("paraphrases.jsonl")
_FAMILIES = (
    "mmlu", "rb_arc", "rb_mbpp", "nine/gsm8k", "nine/math", "nine/race", "nine/natural_questions",
    "nine/commonsense", "flask", "arenahard",
)  # fmt: skip
_EACH = 120  # prompts of a family


def sample(folder: Path) -> list[str]:
    """Return the prompts to rewrite."""
    data = families(folder)
    found: list[str] = []
    for name in _FAMILIES:
        prompts = data[name].prompts
        found += [prompts[place] for place in np.random.default_rng(5).permutation(len(prompts))[:_EACH]]
    return found


def rewrite(rewriting: Rewriting, name: str, prompts: Sequence[str]) -> list[str]:
    """Return the rewritten *prompts*, the same at each call."""
    return [
        rewriting(prompt, random.Random(zlib.crc32(f"{name}/{place}".encode())))
        for place, prompt in enumerate(prompts)
    ]


def flips(before: Array, after: Array, limits: Sequence[float]) -> list[float]:
    """Return the share of scores that are on another side of each limit than before."""
    return [float(((before >= limit) != (after >= limit)).mean()) for limit in limits]


def table(
    scored: scorer.LearnedScorer, prompts: Sequence[str], rewritings: Mapping[str, Rewriting], part: str
) -> list[tuple[str, int, list[float], float]]:
    """Return, by kind of rewriting: name, changed prompts, flips at each share, mean shift of the score."""
    original = np.array([scored.score(prompt).value for prompt in prompts])
    limits = [float(np.quantile(original, 1 - share)) for share in SHARES]
    rows = []
    for name, rewriting in rewritings.items():
        new = rewrite(rewriting, f"{part}/{name}", prompts)
        places = [place for place, text in enumerate(new) if text != prompts[place]]
        after = np.array([scored.score(new[place]).value for place in places])
        shift = float(np.abs(after - original[places]).mean())
        rows.append((name, len(places), flips(original[places], after, limits), shift))
    return rows


def paraphrased(scored: scorer.LearnedScorer, prompts: Sequence[str]) -> tuple[int, list[float], float]:
    """Return the number of hand-written paraphrases, flips at the limits of *prompts*, and the mean shift."""
    original = np.array([scored.score(prompt).value for prompt in prompts])
    limits = [float(np.quantile(original, 1 - share)) for share in SHARES]
    pairs = [json.loads(line) for line in PARAPHRASES.read_text(encoding="utf-8").splitlines()]
    before = np.array([scored.score(pair["prompt"]).value for pair in pairs for _ in pair["same"]])
    after = np.array([scored.score(text).value for pair in pairs for text in pair["same"]])
    return len(after), flips(before, after, limits), float(np.abs(after - before).mean())


def main() -> None:
    """Print the tables, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dev/ and train/")
    parser.add_argument("--artifact", type=Path, help="scorer to measure (default: the shipped one)")
    parser.add_argument("--seen-only", action="store_true", help="only the rewritings that are tuned for")
    arguments = parser.parse_args()
    scored = scorer.load(arguments.artifact)
    prompts = sample(arguments.data)
    parts = {
        "seen": SEEN,
        "checked": CHECKED | {f"{name}, later": found for name, found in LATER.items()},
    } | ({} if arguments.seen_only else {"unseen": UNSEEN})
    for part, rewritings in parts.items():
        rows = table(scored, prompts, rewritings, part)
        print(f"\n| {part} | changed | flips at 30 % | at 50 % | mean shift |\n|---|---|---|---|---|")
        for name, changed, (third, half), shift in rows:
            print(f"| {name} | {changed} | {third:.1%} | {half:.1%} | {shift:.3f} |")
        means = np.mean([row[2] for row in rows], axis=0)
        print(f"| **mean** | | {means[0]:.1%} | {means[1]:.1%} | {np.mean([row[3] for row in rows]):.3f} |")
        print(f"| **worst** | | {max(r[2][0] for r in rows):.1%} | {max(r[2][1] for r in rows):.1%} | |")
    if PARAPHRASES.exists():
        count, (third, half), shift = paraphrased(scored, prompts)
        print(f"\n{count} paraphrases: flips {third:.1%} and {half:.1%}, mean shift {shift:.3f}")


if __name__ == "__main__":
    main()
