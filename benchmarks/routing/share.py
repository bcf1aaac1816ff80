"""Measure how well configured shares of calls are kept while the traffic shifts between families of prompts.

    python -m benchmarks.routing.share FAMILY.jsonl[.gz] FAMILY.jsonl[.gz] ...

Each file has rows of JSON with a `prompt`, and optionally `weak_score` and `strong_score`. The families are
shuffled and sent one after the other, 400 prompts of each, ten times. It compares fixed thresholds made for
the first family, quantiles of a sliding window, and the router's method: quantiles corrected for past over-
and undershoot. For two and more tiers it prints the share of calls of each tier, and the largest deviation
from the configured share in any 200 calls in a row.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

from headrace.routing.scoring.scorer import load as load_scorer
from headrace.routing.share import ShareKeeper

# Of each tier after the first.
SHARES: tuple[tuple[float, ...], ...] = ((0.1,), (0.3,), (0.5,), (0.3, 0.1), (0.4, 0.3), (0.3, 0.2, 0.1))
STRETCH = 200  # consecutive calls over which a share is measured
SEEDS = 10
OF_EACH = 400

Policy: TypeAlias = Callable[[Sequence["Call"]], list[int]]  # the tier's place for each call


@dataclass(frozen=True)
class Call:
    """One prompt: its score, and the outcome on either tier, 0 if the file has none."""

    score: float
    weak: float
    strong: float


def read(path: Path) -> list[Call]:
    """Score the prompts of a file."""
    scorer = load_scorer()
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    rows = [json.loads(line) for line in text.split("\n") if line]
    return [
        Call(scorer.score(row["prompt"]).value, row.get("weak_score", 0.0), row.get("strong_score", 0.0))
        for row in rows
    ]


def place(score: float, thresholds: Sequence[float]) -> int:
    """Return the place of the largest tier whose threshold the score reaches."""
    return max(place for place, mark in enumerate(thresholds) if score >= mark)


def fixed(families: Sequence[Sequence[Call]], shares: Sequence[float]) -> Policy:
    """Return the tiers of all calls by fixed thresholds, made for the first family."""
    ordered = sorted((call.score for call in families[0]), reverse=True)
    above = [sum(shares[tier:]) for tier in range(len(shares))]
    marks = [0.0, *(ordered[round(share * (len(ordered) - 1))] for share in above)]
    return lambda stream: [place(call.score, marks) for call in stream]


def window(shares: Sequence[float], correction: float) -> Policy:
    """Return the tiers of all calls by the router's thresholds; an infinite correction is none."""

    def send(stream: Sequence[Call]) -> list[int]:
        keeper = ShareKeeper(shares, correction=correction)
        sent = []
        for call in stream:
            sent.append(place(call.score, keeper.thresholds()))
            keeper.record(call.score, sent[-1])
        return sent

    return send


def worst(sent: Sequence[int], tier: int, share: float) -> float:
    """Return the largest deviation of the tier's share in any `STRETCH` calls in a row, 0 to 1."""
    sums = list(accumulate((place == tier for place in sent), initial=0))
    stretches = zip(sums, sums[STRETCH:], strict=False)
    return max(abs((after - before) / STRETCH - share) for before, after in stretches)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="+", type=Path)
    families = [read(path) for path in parser.parse_args().families]
    streams = [shuffled(families, seed) for seed in range(SEEDS)]
    print(f"of each tier, smallest first; worst of any {STRETCH} calls in a row, in points")
    print(f"{'wanted, %':17} {'thresholds':28} {'came out, %':25} {'worst':25} quality")
    for shares in SHARES:
        wanted = (1 - sum(shares), *shares)
        for name, send in (
            ("fixed, from the first family", fixed(families, shares)),
            ("sliding window", window(shares, 1e9)),
            ("window, made up for", window(shares, 8.0)),
        ):
            every = [(stream, send(stream)) for stream in streams]
            came = [
                statistics.mean(sent.count(tier) / len(sent) for _, sent in every)
                for tier in range(len(wanted))
            ]
            off = [max(worst(sent, tier, share) for _, sent in every) for tier, share in enumerate(wanted)]
            print(
                f"{' / '.join(f'{100 * share:.0f}' for share in wanted):17} {name:28} "
                f"{' / '.join(f'{100 * share:.1f}' for share in came):25} "
                f"{' / '.join(f'{100 * by:.1f}' for by in off):25} {quality(every, len(wanted))}"
            )


def shuffled(families: Sequence[Sequence[Call]], seed: int) -> list[Call]:
    """Return a stream of the families, one after the other."""
    generator = random.Random(seed)
    return [call for family in families for call in generator.sample(family, min(OF_EACH, len(family)))]


def quality(every: Sequence[tuple[Sequence[Call], Sequence[int]]], tiers: int) -> str:
    """Return the mean outcome. With three tiers, the outcomes of the middle one are unknown."""

    if tiers != 2:
        return "-"
    mean = statistics.mean(
        call.strong if place else call.weak
        for stream, sent in every
        for call, place in zip(stream, sent, strict=True)
    )
    return f"{mean:.3f}"


if __name__ == "__main__":
    main()
