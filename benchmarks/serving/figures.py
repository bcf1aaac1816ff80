"""Compute figures from arrival times, with the names and definitions of `headrace bench`.

They are in `headrace.cli.bench.latencies`; here, the answers of a closed loop are summarized.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.cli.bench.latencies import gaps, percentile, time_per_output_token


@dataclass
class Answer:
    """The answer to one request; times in seconds on one clock.

    arrivals   of each message: its arrival, and its number of tokens
    """

    request: int
    wanted: int
    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens received."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.arrivals[0][0] - self.sent

    @property
    def e2el(self) -> float:
        """Time to the last token."""
        return self.arrivals[-1][0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per token after the first; None for an answer of one token."""
        return time_per_output_token(self.ttft, self.e2el, self.tokens)

    @property
    def gaps(self) -> list[float]:
        """Times between messages."""
        return gaps([at for at, _ in self.arrivals])


class WrongLength(Exception):
    """An answer does not have the requested number of tokens, so its run is invalid."""


def check(answers: Sequence[Answer]) -> None:
    """Raise WrongLength unless every answer has the requested number of tokens."""
    for answer in answers:
        if answer.tokens != answer.wanted:
            raise WrongLength(
                f"request {answer.request} asked for {answer.wanted} tokens and got {answer.tokens}"
            )


def figures(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Summarize a run of *seconds*: rates per second, times in milliseconds."""
    tokens = sum(answer.tokens for answer in answers)
    kept = {
        "requests": float(len(answers)),
        "output_tokens": float(tokens),
        "duration_s": seconds,
        "output_tokens_per_s": tokens / seconds,
        "requests_per_s": len(answers) / seconds,
    }
    times = {
        "ttft": [answer.ttft for answer in answers],
        "tpot": [answer.tpot for answer in answers if answer.tpot is not None],
        "itl": [gap for answer in answers for gap in answer.gaps],
        "e2el": [answer.e2el for answer in answers],
    }
    for name, values in times.items():
        if not values:
            continue
        kept[f"{name}_mean_ms"] = statistics.fmean(values) * 1e3
        for percent in (50, 90, 99):
            kept[f"{name}_p{percent}_ms"] = percentile(values, percent) * 1e3
    return kept


@dataclass(frozen=True)
class Spread:
    """One figure over the repetitions."""

    median: float
    low: float
    high: float


def spread(runs: Sequence[Mapping[str, float]], name: str) -> Spread | None:
    """Return median and range of one figure; None if no run has it."""
    values = [run[name] for run in runs if name in run]
    return Spread(statistics.median(values), min(values), max(values)) if values else None
