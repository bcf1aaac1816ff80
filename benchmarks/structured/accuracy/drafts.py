"""How well log-probabilities separate right drafts from wrong ones, if the drafts have their form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from benchmarks.structured.accuracy.rows import Row
from headrace.routing.drafts import check


def table(rows: Sequence[Row]) -> str:
    """Return, for each measure, its AUC, and the result of releasing the best drafts by it."""
    checker = check.load()
    measures: dict[str, Callable[[Row], float]] = {
        "the check of texts, P(good)": lambda row: checker.check("", row.text, logprobs=row.logprobs).good,
        "mean log-probability": lambda row: sum(row.logprobs) / max(len(row.logprobs), 1),
        "lowest log-probability": lambda row: min(row.logprobs, default=0.0),
        "sum of log-probabilities": lambda row: sum(row.logprobs),
    }
    lines = ["| drafts | measure | AUC |", "|---|---|---|"]
    structured = [row for row in rows if row.arm == "schema"]
    calls = [row for row in rows if row.arm == "tools" and row.calls]
    for name, drafts in (("extraction", structured), ("calls", calls)):
        whole = [row for row in drafts if row.valid]
        right = sum(row.right for row in whole)
        lines.append(f"| {name}, {len(whole)} of {len(drafts)} with their form, {right} right | | |")
        for measure, of in measures.items():
            lines.append(f"| {name} | {measure} | {auc([(of(row), row.right) for row in whole]):.2f} |")
    return "\n".join(lines)


def auc(rows: Sequence[tuple[float, bool]]) -> float:
    """Return the share of pairs of a right and a wrong draft in which the right one has the higher value."""
    right = [value for value, ok in rows if ok]
    wrong = [value for value, ok in rows if not ok]
    if not right or not wrong:
        return float("nan")
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(right, wrong)]
    return sum(pairs) / len(pairs)
