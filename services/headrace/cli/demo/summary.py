"""Summarise the answers to many prompts."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from headrace.cli.answers import seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from headrace.cli.answers import Answer
    from headrace.cli.launch.tiers import TierSpec


@dataclass(frozen=True)
class Outcome:
    """The answer to one prompt, and the failure that ended it, if any."""

    kind: str
    answer: Answer
    failure: str = ""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return bool(self.answer.finish) and not self.failure


@dataclass(frozen=True)
class Summary:
    """Figures of all outcomes. Times are in seconds."""

    requests: Mapping[str, int]  # by tier, of those that were accepted
    tokens: Mapping[str, int]  # by tier
    elapsed: float
    first_tokens: Sequence[float]
    failures: int

    @property
    def tokens_per_second(self) -> float:
        """All tokens of all requests, divided by the elapsed time."""
        return sum(self.tokens.values()) / self.elapsed if self.elapsed > 0 else 0.0


def summarise(outcomes: Sequence[Outcome], elapsed: float) -> Summary:
    """Summarise *outcomes*, which took *elapsed* seconds in total."""
    requests: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.answer.tier:
            requests[outcome.answer.tier] += 1
            tokens[outcome.answer.tier] += outcome.answer.tokens
    firsts = [outcome.answer.first_token for outcome in outcomes if outcome.answer.first_token is not None]
    failures = sum(not outcome.finished for outcome in outcomes)
    return Summary(requests, tokens, elapsed, firsts, failures)


def unasked(tiers: Sequence[TierSpec], outcomes: Sequence[Outcome]) -> list[str]:
    """Return the names of those of *tiers* that no prompt was sent to."""
    asked = {outcome.answer.tier for outcome in outcomes}
    return [tier.name for tier in tiers if tier.name not in asked]


def summary_table(summary: Summary) -> Table:
    """Return the figures as a table."""
    table = Table(title="summary", title_justify="left", show_header=False)
    for tier, count in summary.requests.items():
        table.add_row(f"requests on {tier}", f"{count} ({summary.tokens[tier]} tokens)")
    table.add_row("failures", str(summary.failures), style="red" if summary.failures else "")
    table.add_row("elapsed", seconds(summary.elapsed))
    table.add_row("tokens per second, overall", f"{summary.tokens_per_second:.1f}")
    if summary.first_tokens:
        table.add_row("time to first token, median", seconds(statistics.median(summary.first_tokens)))
        table.add_row("time to first token, longest", seconds(max(summary.first_tokens)))
    return table
