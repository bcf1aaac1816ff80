"""What a score of a prompt's complexity is.

The score runs from 0 (a greeting) to 1 (needs the largest model). It reads the text and nothing else, so
the router can afford it on every request. `scorer.py` makes scores, `policy.py` turns them into tiers; this
module knows neither.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Feature:
    """What one feature of the text adds to the score.

    value     how strongly it is present, 0 to 1
    log_odds  its share: above 0 speaks for a larger tier
    """

    name: str
    value: float
    log_odds: float


@dataclass(frozen=True, slots=True)
class Score:
    """How hard a prompt looks: ln(value / (1 - value)) is the bias and all features' log_odds added up."""

    value: float
    bias: float
    features: tuple[Feature, ...]


# Of a prompt that could not be scored: the router goes by the middle.
UNSCORED = Score(0.5, 0.0, ())


class Scorer(Protocol):
    """Scores prompts: deterministic, and quick enough for every request (well under a millisecond)."""

    def score(self, text: str) -> Score:
        """Score the text of a prompt, any length."""
        ...


def fingerprint(scorer: Scorer) -> str:
    """Equal for scorers that score alike, and then only: what they say of a few prompts, as a digest.

    Thresholds that were made for one scorer mean nothing to another.
    """
    said = [round(scorer.score(text).value, 6) for text in _PROBES]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


_PROBES = (
    "Hello!",
    "What is the capital of France?",
    "Prove that there are infinitely many primes.",
    "Write a Python function that merges two sorted lists.",
    "A train leaves at 9:40 and arrives at 12:05. How long does it travel?",
)


def sigmoid(log_odds: float) -> float:
    """The probability of these log-odds; safe at both ends."""
    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    return math.exp(log_odds) / (1 + math.exp(log_odds))
