"""Fit the draft check to real drafts with outcomes, and measure it on families that it has not seen.

    python -m benchmarks.routing.drafts generate    # generate drafts: about forty minutes on two cores
    python -m benchmarks.routing.drafts fit         # write the shipped artifact: always the same bytes
    python -m benchmarks.routing.drafts evaluate    # print the tables, in Markdown

`drafts.jsonl.gz` has drafts of SmolLM2-135M and Qwen2.5-Coder-0.5B for the questions of `templates.py`,
each with log-probabilities, two samples, and whether it is right. The prompts are ours; the drafts are
under the models' licence, Apache-2.0.

The model is a logistic regression with three parts: a bias, the weights set by hand times one common scale,
and a correction of each weight with a prior around 0. The standard deviation of that prior is chosen by
leaving out one family at a time, and is 0 unless corrections clearly help. At 0, findings in the text keep
the order set by hand, and P(good) is calibrated. The weights of log-probabilities and samples are always
fitted. Each kind of evidence (the text alone, log-probabilities, samples, both) has its own weights.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.generate import FILE, Drafted, generate, pack, read
from benchmarks.routing.templates import HELD_OUT, questions
from headrace.routing.drafts import check as draft_check
from headrace.routing.drafts.check import EVIDENCE, Weights
from headrace.routing.drafts.features import FEATURES, measure
from headrace.routing.learning.tradeoff import quality

Array = NDArray[np.float64]

NAMES = tuple(FEATURES)
BY_HAND = Path(__file__).with_name("draft_check_by_hand.json")
SPREADS = (0.0, 0.1, 0.2, 0.4, 0.8)  # standard deviations of the corrections, in log-odds
_SUPPORTS = frozenset(["samples_agree"])  # findings that speak for a draft; all others speak against it
_SCALE_SPREAD = 0.5
# Findings of log-probabilities and samples have only rough weights by hand, so they have a wide prior.
_EVIDENT = frozenset(["unsure", "unsure_at_worst", "samples_agree", "samples_differ"])
_EVIDENT_SPREAD = 1.0


@dataclass(frozen=True)
class Measured:
    """Drafts as measured with one kind of evidence: findings x [rows, F], and right [rows], 0 or 1."""

    rows: Sequence[Drafted]
    x: Array
    right: Array

    def where(self, wanted: NDArray[np.bool_]) -> Measured:
        """Return the rows at which *wanted* [rows] is true."""
        rows = [row for row, kept in zip(self.rows, wanted, strict=True) if kept]
        return Measured(rows, self.x[wanted], self.right[wanted])


def see(rows: Sequence[Drafted], evidence: str, samples: int = 1) -> Measured:
    """Measure *rows* with this kind of evidence, with at most *samples* samples of each."""
    x = []
    for row in rows:
        found = measure(
            row.prompt,
            row.draft,
            finished=row.finished,
            logprobs=row.logprobs if "logprobs" in evidence else None,
            samples=row.samples[:samples] if "samples" in evidence else (),
        )
        x.append([found[name] for name in NAMES])
    return Measured(rows, np.array(x), np.array([float(row.right) for row in rows]))


def by_hand() -> Weights:
    """Return the weights that were set by hand."""
    return draft_check.read_weights(json.loads(BY_HAND.read_text(encoding="utf-8")))


def fit(data: Measured, hand: Weights, spread: float) -> Weights:
    """Return the maximum a posteriori weights; each family of each tier counts the same.

    spread   standard deviation of each weight's correction; 0: only bias, scale, and the weights of
             log-probabilities and samples are fitted

    A finding that speaks against a draft never speaks for it: where the rows would have it so, it is silent.
    """
    centre = np.array([hand.weights[name] for name in NAMES])
    weight = _balanced(data.rows)
    scaled = data.x @ centre
    evident = np.array([name in _EVIDENT for name in NAMES])
    spreads = np.where(evident, _EVIDENT_SPREAD, spread)
    free = (spreads > 0) & (data.x.any(axis=0) | ~evident)
    fixed = np.zeros(len(NAMES))
    for _ in range(len(NAMES)):
        design = np.column_stack([np.ones(len(scaled)), scaled, data.x[:, free]])
        start = np.concatenate([[hand.bias, 1.0], fixed[free]])
        precision = np.concatenate([[1e-3, _SCALE_SPREAD**-2], spreads[free] ** -2])
        offset = data.x[:, ~free] @ fixed[~free]
        solved = _maximum(design, offset, data.right, weight, start, precision)
        scale = max(float(solved[1]), 0.05)
        corrections = fixed.copy()
        corrections[free] = solved[2:]
        weights = scale * centre + corrections
        against = np.array([name not in _SUPPORTS for name in NAMES])
        wrong = free & np.where(against, weights > 1e-9, weights < -1e-9)
        if not wrong.any():
            break
        fixed[wrong] = -scale * centre[wrong]
        free &= ~wrong
    weights = np.where(against, np.minimum(weights, 0.0), np.maximum(weights, 0.0))
    return Weights(
        round(float(solved[0]), 3),
        {name: round(float(value), 3) + 0.0 for name, value in zip(NAMES, weights, strict=True)},
    )


def _balanced(rows: Sequence[Drafted]) -> Array:
    """Return weights [rows], mean 1, with which each family of each tier counts the same."""

    places = [(row.family, row.tier) for row in rows]
    sizes = {place: places.count(place) for place in set(places)}
    return np.array([len(rows) / len(sizes) / sizes[place] for place in places])


def _maximum(
    design: Array, offset: Array, right: Array, weight: Array, start: Array, precision: Array
) -> Array:
    """Maximise a logistic likelihood with a Gaussian prior by Newton's method with step halving."""

    def loss(at: Array) -> float:
        logits = design @ at + offset
        likelihood = weight @ (np.logaddexp(0.0, logits) - right * logits)
        return float(likelihood + precision @ (at - start) ** 2 / 2)

    solved = start.copy()
    for _ in range(50):
        odds = 1 / (1 + np.exp(-np.clip(design @ solved + offset, -30, 30)))
        gradient = design.T @ (weight * (right - odds)) - precision * (solved - start)
        curvature = (design * (weight * odds * (1 - odds))[:, None]).T @ design + np.diag(precision)
        step = np.linalg.solve(curvature, gradient)
        while loss(solved + step) > loss(solved) and float(np.abs(step).max()) > 1e-9:
            step = step / 2
        solved = solved + step
        if float(np.abs(step).max()) < 1e-8:
            break
    return solved


def good(weights: Weights, x: Array) -> Array:
    """Return P(good) [rows]."""
    vector = np.array([weights.weights[name] for name in NAMES])
    chances: Array = 1 / (1 + np.exp(-(weights.bias + x @ vector)))
    return chances


def unseen(data: Measured, hand: Weights, spread: float) -> Array:
    """Return P(good) [rows], each by weights that were fitted without the row's family."""
    found = np.zeros(len(data.rows))
    for family in sorted({row.family for row in data.rows}):
        places = np.array([row.family == family for row in data.rows])
        fitted = fit(data.where(~places), hand, spread)
        found[places] = good(fitted, data.x[places])
    return found


def log_loss(chances: Array, right: Array, weight: Array) -> float:
    """Return the weighted mean of -ln P(outcome)."""
    kept = np.clip(chances, 1e-6, 1 - 1e-6)
    each = -(right * np.log(kept) + (1 - right) * np.log(1 - kept))
    return float((weight * each).sum() / weight.sum())


def area(chances: Array, right: Array) -> float:
    """Return the AUC: how often a right draft scores above a wrong one. Ties count half; NaN without both."""
    yes, no = chances[right > 0.5], chances[right < 0.5]
    if not (len(yes) and len(no)):
        return float("nan")
    return float(np.mean((yes[:, None] > no).astype(float) + 0.5 * (yes[:, None] == no)))


def within(chances: Array, data: Measured) -> float:
    """Return the AUC within each family of each tier, averaged by the number of compared pairs."""
    total = pairs = 0.0
    for family, tier in {(row.family, row.tier) for row in data.rows}:
        places = np.array([(row.family, row.tier) == (family, tier) for row in data.rows])
        right = data.right[places]
        count = float(right.sum() * (1 - right).sum())
        if count:
            total, pairs = total + count * area(chances[places], right), pairs + count
    return total / pairs if pairs else float("nan")


def choose(data: Measured, hand: Weights) -> float:
    """Return the spread with the least log-loss on unseen families; 0 if it is as good within two errors.

    The error is that of the difference's mean over the families.
    """
    names = sorted({row.family for row in data.rows})
    weight = _balanced(data.rows)
    family = np.array([names.index(row.family) for row in data.rows])
    losses = {}
    for spread in SPREADS:
        chances = unseen(data, hand, spread)
        losses[spread] = np.array(
            [
                log_loss(chances[places], data.right[places], weight[places])
                for places in (family == place for place in range(len(names)))
            ]
        )
    best = min(SPREADS, key=lambda spread: float(losses[spread].mean()))
    gained = losses[0.0] - losses[best]
    error = gained.std(ddof=1) / len(names) ** 0.5
    return best if gained.mean() > 2 * error else 0.0


def taught(rows: Sequence[Drafted]) -> list[Drafted]:
    """Return the rows that the shipped check is fitted to."""
    return [row for row in rows if row.family not in HELD_OUT]


def make(rows: Sequence[Drafted]) -> dict[str, tuple[float, Weights]]:
    """Return, for each kind of evidence, the chosen spread and the weights fitted to all training rows."""
    hand, made = by_hand(), {}
    for evidence in EVIDENCE:
        data = see(taught(rows), evidence)
        spread = choose(data, hand)
        made[evidence] = (spread, fit(data, hand, spread))
    return made


def save(made: Mapping[str, tuple[float, Weights]], path: Path) -> None:
    """Write the artifact."""
    content = {
        "format": draft_check.FORMAT,
        "kind": "draft_check",
        "made": "python -m benchmarks.routing.drafts fit",
        "evidence": {
            evidence: {"spread": spread, "bias": weights.bias, "weights": dict(weights.weights)}
            for evidence, (spread, weights) in made.items()
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# Tables.


def _ranked(chances: Array, data: Measured, strong: Array | None = None) -> str:
    """Return APGR, CPT50 and CPT80 if escalation gives *strong*, or a right answer; "-" without a gap."""
    try:
        found = quality(-chances, data.right, np.ones(len(chances)) if strong is None else strong)
    except ValueError:
        return "-"
    return f"{found.apgr:.3f} / {found.cpt50:.0f} / {found.cpt80:.0f}"


def compare(rows: Sequence[Drafted], samples: int = 1) -> None:
    """Print a table by kind of evidence: set by hand, calibrated, and fitted, all on unseen families."""
    hand = by_hand()
    outcomes = {(row.id, row.tier): float(row.right) for row in rows}
    print(
        "| evidence | weights | log-loss | Brier | AUC | AUC within | small to large | small, strong = 1 | "
        "large, strong = 1 |\n|---|---|---|---|---|---|---|---|---|"
    )
    for evidence in EVIDENCE:
        data = see(taught(rows), evidence, samples)
        weight = _balanced(data.rows)
        small = np.array([row.tier == "small" for row in data.rows])
        pairs = np.array([row.tier == "small" and (row.id, "large") in outcomes for row in data.rows])
        strong = np.array(
            [outcomes[row.id, "large"] for row, kept in zip(data.rows, pairs, strict=True) if kept]
        )
        for name, chances in (
            ("by hand", good(hand, data.x)),
            ("by hand, calibrated", unseen(data, hand, 0.0)),
            ("each corrected, spread 0.2", unseen(data, hand, 0.2)),
        ):
            told = [
                _ranked(chances[pairs], data.where(pairs), strong),
                _ranked(chances[small], data.where(small)),
                _ranked(chances[~small], data.where(~small)),
            ]
            brier = float((weight * (chances - data.right) ** 2).sum() / weight.sum())
            print(
                f"| {evidence} | {name} | {log_loss(chances, data.right, weight):.3f} | {brier:.3f} | "
                f"{area(chances, data.right):.3f} | {within(chances, data):.3f} | {' | '.join(told)} |",
                flush=True,
            )


def held_out(rows: Sequence[Drafted]) -> None:
    """Print a table of the word problems, which are held out, by tier and evidence, by hand and fitted."""
    hand, made = by_hand(), make(rows)
    print(
        "| word problems | drafts (right) | evidence | by hand: AUC, APGR | fitted: AUC, APGR | best APGR |"
    )
    print("|---|---|---|---|---|---|")
    for family in (*HELD_OUT, "all"):
        for tier in ("small", "large"):
            wanted = HELD_OUT if family == "all" else (family,)
            chosen = [row for row in rows if row.family in wanted and row.tier == tier]
            for evidence in EVIDENCE if chosen else ():
                data = see(chosen, evidence)
                share = float(data.right.mean())
                told = [
                    f"{area(chances, data.right):.3f}, {_ranked(chances, data)}"
                    for chances in (good(hand, data.x), good(made[evidence][1], data.x))
                ]
                print(
                    f"| {family}, {tier} | {len(chosen)} ({100 * share:.0f} %) | {evidence} | "
                    f"{' | '.join(told)} | {(1 + share) / 2:.3f} |",
                    flush=True,
                )


def reliability(rows: Sequence[Drafted]) -> None:
    """Print the share of right drafts by P(good), on unseen families."""
    hand = by_hand()
    print("| P(good) | by hand: drafts, right | fitted, text | fitted, log-probabilities | fitted, both |")
    print("|---|---|---|---|---|")
    columns = []
    for evidence, fitted in (("text", False), ("text", True), ("logprobs", True), ("logprobs+samples", True)):
        data = see(taught(rows), evidence)
        spread = choose(data, hand)
        columns.append((unseen(data, hand, spread) if fitted else good(hand, data.x), data.right))
    for low in np.arange(0.0, 1.0, 0.2):
        cells = []
        for chances, right in columns:
            inside = (chances >= low) & (chances < low + 0.2)
            share = f"{100 * right[inside].mean():.0f} %" if inside.any() else "-"
            cells.append(f"{int(inside.sum())}, {share}")
        print(f"| {low:.1f} to {low + 0.2:.1f} | {' | '.join(cells)} |")


def latency(rows: Sequence[Drafted]) -> None:
    """Print the CPU time of a check."""

    checker, times = draft_check.load(), []
    for row in rows:
        began = time.thread_time()
        checker.check(
            row.prompt, row.draft, finished=row.finished, logprobs=row.logprobs, samples=row.samples[:1]
        )
        times.append(1000 * (time.thread_time() - began))
    print(
        f"{len(times)} drafts checked: p50 {np.percentile(times, 50):.2f} ms, "
        f"p99 {np.percentile(times, 99):.2f} ms of CPU"
    )


def main() -> None:
    """Generate, fit or evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["generate", "fit", "evaluate"])
    parser.add_argument("--drafts", type=Path, default=FILE, help="the labelled drafts (default: ours)")
    parser.add_argument(
        "--out", type=Path, default=draft_check.SHIPPED, help="where fit writes (default: what is shipped)"
    )
    parser.add_argument("--questions", type=int, default=70, help="generate: how many of each family")
    arguments = parser.parse_args()
    if arguments.what == "generate":
        scratch = arguments.drafts.with_suffix("").with_suffix(".part.jsonl")
        done = {(row.id, row.tier) for row in read(scratch)} if scratch.exists() else set()
        stories = 12 * arguments.questions // 7
        asyncio.run(generate(questions(arguments.questions, stories), scratch, done))
        pack(list(read(scratch)), arguments.drafts)
        scratch.unlink()
        print(f"{arguments.drafts}: {arguments.drafts.stat().st_size:,} bytes")
        return
    rows = list(read(arguments.drafts))
    if arguments.what == "fit":
        made = make(rows)
        save(made, arguments.out)
        for evidence, (spread, weights) in made.items():
            print(f"{evidence}: spread {spread:g}, bias {weights.bias:+.2f}")
        print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")
        return
    for table in (compare, held_out, reliability, latency):
        table(rows)
        print()


if __name__ == "__main__":
    main()
