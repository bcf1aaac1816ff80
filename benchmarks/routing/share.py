"""Is a wanted share of large calls held while the traffic shifts from one family of prompts to another?

    python -m benchmarks.routing.share FAMILY.jsonl[.gz] FAMILY.jsonl[.gz] ...

Each file holds rows of JSON with a `prompt`, and perhaps `weak_score` and `strong_score`. The families are
shuffled and sent one after the other, 400 prompts of each, ten times over. Compared are a fixed threshold
made for the first family, the same quantile of a sliding window, and the router's own: that window with
what was called too much or too little made up for.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.router.scorer import load as load_scorer
from headrace.router.share import ShareKeeper

SHARES = (0.1, 0.3, 0.5)
STRETCH = 200  # calls over which a share is looked at
SEEDS = 10
OF_EACH = 400


@dataclass(frozen=True)
class Call:
    """One prompt: its score, and the outcome on either tier; both 0 where the file has none."""

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


def fixed(families: Sequence[Sequence[Call]], share: float) -> Callable[[Sequence[Call]], list[bool]]:
    """A threshold made for the first family."""
    ordered = sorted((call.score for call in families[0]), reverse=True)
    mark = ordered[round(share * (len(ordered) - 1))]
    return lambda stream: [call.score >= mark for call in stream]


def window(share: float, correction: float) -> Callable[[Sequence[Call]], list[bool]]:
    """The router's thresholds; an endless correction leaves the window alone."""

    def send(stream: Sequence[Call]) -> list[bool]:
        keeper = ShareKeeper([share], correction=correction)
        sent = []
        for call in stream:
            up = call.score >= keeper.thresholds()[1]
            keeper.note(call.score, int(up))
            sent.append(up)
        return sent

    return send


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="+", type=Path)
    families = [read(path) for path in parser.parse_args().families]
    print(f"{'wanted':>7} {'thresholds':28} {'share':>6} {'worst of any ' + str(STRETCH):>17} {'quality':>8}")
    for share in SHARES:
        for name, send in (
            ("fixed, from the first family", fixed(families, share)),
            ("sliding window", window(share, 1e9)),
            ("window, made up for", window(share, 8.0)),
        ):
            shares, worst, quality = [], 0.0, []
            for seed in range(SEEDS):
                generator = random.Random(seed)
                stream = [
                    call
                    for family in families
                    for call in generator.sample(family, min(OF_EACH, len(family)))
                ]
                sent = send(stream)
                shares.append(statistics.mean(sent))
                worst = max(
                    worst,
                    *(
                        abs(sum(sent[at : at + STRETCH]) / STRETCH - share)
                        for at in range(len(sent) - STRETCH + 1)
                    ),
                )
                quality.append(
                    statistics.mean(
                        call.strong if up else call.weak for call, up in zip(stream, sent, strict=True)
                    )
                )
            print(
                f"{share:7.0%} {name:28} {statistics.mean(shares):6.1%} {100 * worst:10.1f} points "
                f"{statistics.mean(quality):8.3f}"
            )


if __name__ == "__main__":
    main()
