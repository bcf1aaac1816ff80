"""How well log-probabilities separate right drafts from wrong ones, if the drafts have their form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from benchmarks.structured.accuracy.rows import Row
from benchmarks.structured.accuracy.tasks import TASKS
from headrace.routing.drafts import check
from headrace.routing.drafts.rules import CascadeRules


def table(rows: Sequence[Row]) -> str:
    """Return for each measure its AUC, and how many drafts are released by the default minimum."""
    checker = check.load()
    least = CascadeRules().min_quality
    measures: dict[str, Callable[[Row], float]] = {
        "the check of texts, P(good)": lambda row: checker.check("", row.text, logprobs=row.logprobs).good,
        "its findings about log-probabilities, P(good)": lambda row: (
            checker.check_certainty(row.logprobs).good
        ),
        "mean log-probability": lambda row: sum(row.logprobs) / len(row.logprobs),
        "sum of log-probabilities": lambda row: sum(row.logprobs),
    }
    lines = ["| drafts | measure | AUC | released | of which right |", "|---|---|---|---|---|"]
    structured = [row for row in rows if row.arm == "schema"]
    calls = [row for row in rows if row.arm == "required, one call"]
    for name, drafts in (("extraction", structured), ("calls", calls)):
        whole = [row for row in drafts if TASKS[row.id].valid(row)]
        right = sum(TASKS[row.id].right(row) for row in whole)
        lines.append(f"| {name} | form alone | | {len(whole)} of {len(drafts)} | {right} |")
        for measure, of in measures.items():
            valued = [(of(row), TASKS[row.id].right(row)) for row in whole]
            released = [ok for value, ok in valued if value >= least]
            shown = f"{len(released)} | {sum(released)}" if "P(good)" in measure else "|"
            lines.append(f"| {name} | {measure} | {auc(valued):.2f} | {shown} |")
    return "\n".join(lines)


def auc(rows: Sequence[tuple[float, bool]]) -> float:
    """Return the share of pairs of a right and a wrong draft in which the right one has the higher value."""
    right = [value for value, ok in rows if ok]
    wrong = [value for value, ok in rows if not ok]
    if not right or not wrong:
        return float("nan")
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(right, wrong)]
    return sum(pairs) / len(pairs)
