"""Compare the order of prompts across languages: `python -m benchmarks.routing.languages`.

`parallel.jsonl` has the same prompts in thirteen languages, translated by hand and ranked by what they ask
for: 0 greeting, thanks and fact; 1 translation and summary; 2 mathematics, code, proof and reasoning. The
words of `scoring/languages.py` were chosen without these prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from headrace.routing.scoring import scorer

PARALLEL = Path(__file__).with_name("parallel.jsonl")
LANGUAGES = ("en", "zh", "hi", "es", "ar", "fr", "bn", "pt", "ru", "ur", "de", "ja", "id")

# The same easy and hard prompts in languages that the scorer does not know.
UNKNOWN = {
    "ko": ("일본의 수도는 어디입니까?", "소수가 무한히 많다는 것을 증명하세요."),
    "th": ("เมืองหลวงของญี่ปุ่นคืออะไร", "จงพิสูจน์ว่ามีจำนวนเฉพาะเป็นอนันต์"),
    "el": ("Ποια είναι η πρωτεύουσα της Ιαπωνίας;", "Απόδειξε ότι υπάρχουν άπειροι πρώτοι αριθμοί."),
    "tr": ("Japonya'nın başkenti neresidir?", "Sonsuz sayıda asal sayı olduğunu kanıtlayın."),
    "he": ("מהי בירת יפן?", "הוכח שיש אינסוף מספרים ראשוניים."),
    "fi": ("Mikä on Japanin pääkaupunki?", "Todista, että alkulukuja on äärettömän monta."),
    "sw": ("Mji mkuu wa Japani ni upi?", "Thibitisha kwamba kuna namba tasa zisizo na kikomo."),
}


def auc(easy: Sequence[float], hard: Sequence[float]) -> float:
    """Return the share of pairs in which the hard prompt has the higher score; ties count half."""
    return sum((b > a) + (a == b) / 2 for a, b in product(easy, hard)) / (len(easy) * len(hard))


def agreement(ranks: Sequence[int], scores: Sequence[float]) -> float:
    """Return Kendall's tau between ranks and scores over the pairs with different ranks."""
    pairs = [
        (scores[a] < scores[b]) - (scores[a] > scores[b])
        for a, b in product(range(len(ranks)), repeat=2)
        if ranks[a] < ranks[b]
    ]
    return sum(pairs) / len(pairs)


def scores_of(scored: scorer.LearnedScorer, language: str, part: str) -> tuple[list[int], list[float]]:
    """Return ranks and scores of the prompts of a part in one language."""
    rows = [json.loads(line) for line in PARALLEL.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["part"] == part]
    return [row["rank"] for row in rows], [scored.score(row[language]).value for row in rows]


def main() -> None:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="scorer to measure (default: the shipped one)")
    parser.add_argument("--scores", action="store_true", help="print each score")
    arguments = parser.parse_args()
    scored = scorer.load(arguments.artifact)
    print("| language | seen: AUC | tau | unseen: AUC | tau | mean of easy | of hard |")
    print("|---|---|---|---|---|---|---|")
    for language in LANGUAGES:
        cells = []
        for part in ("seen", "unseen"):
            ranks, values = scores_of(scored, language, part)
            easy = [value for rank, value in zip(ranks, values, strict=True) if rank == 0]
            hard = [value for rank, value in zip(ranks, values, strict=True) if rank == 2]
            cells += [f"{auc(easy, hard):.2f}", f"{agreement(ranks, values):.2f}"]
            if arguments.scores:
                print(language, part, [f"{value:.2f}" for value in values])
        cells += [f"{sum(easy) / len(easy):.2f}", f"{sum(hard) / len(hard):.2f}"]
        print(f"| {language} | {' | '.join(cells)} |")
    print("\n| unknown language | fact | proof |\n|---|---|---|")
    for language, prompts in UNKNOWN.items():
        print(f"| {language} | {' | '.join(f'{scored.score(prompt).value:.2f}' for prompt in prompts)} |")


if __name__ == "__main__":
    main()
