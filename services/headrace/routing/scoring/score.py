"""Defines the score of a prompt: an estimate of how much a larger model would gain on it.

A score is between 0 (a greeting) and 1 (needs the largest model). It depends on the text alone and is cheap
enough for every request. `scorer.py` computes scores, and `policy.py` turns them into tiers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from headrace.routing.scoring.conversation import Carried, Earlier, Turn
from headrace.routing.success.estimate import Estimate

Objective = Literal["correctness", "both", "preference"]  # what a larger tier shall gain


@dataclass(frozen=True, slots=True)
class Feature:
    """The contribution of one feature of a text.

    value     how strongly the feature is present, 0 to 1
    log_odds  its contribution; of a prompt, above 0 favours a larger tier
    """

    name: str
    value: float
    log_odds: float


@dataclass(frozen=True, slots=True)
class Score:
    """A score and its explanation: ln(value / (1 - value)) is bias plus the sum of all log_odds.

    names, values, log_odds   of each feature, as in `Feature`; `features` has those that are present
    continues   how much the last turn depends on earlier ones, from 0 (not at all) to 1 ("yes, go on")
    estimates   by tier; empty unless the scorer was fitted to outcomes of tiers
    carried     what the next turn inherits; None: nothing changes, as after "thanks"
    """

    value: float
    bias: float
    names: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    log_odds: tuple[float, ...] = ()
    continues: float = 0.0
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    carried: Carried | None = None

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features that are present. They are made here because most scores are never explained."""
        columns = zip(self.names, self.values, self.log_odds, strict=True)
        return tuple(Feature(name, value, log_odds) for name, value, log_odds in columns if value)


# Stands for the score of a prompt that could not be scored.
UNSCORED = Score(0.5, 0.0)


class Scorer(Protocol):
    """Scores prompts. It is deterministic and takes well under a millisecond."""

    def score(self, text: str) -> Score:
        """Score the text of a prompt of any length."""
        ...

    def score_turns(self, turns: Sequence[Turn], earlier: Earlier | None = None) -> Score:
        """Score the last turn of the user, in the light of the turns that it refers to.

        turns     oldest first, at least one
        earlier   what the router remembers of the conversation; None: nothing
        """
        ...


def fingerprint(scorer: Scorer) -> str:
    """Return a digest of the scores and estimates of a few prompts, which identifies the scorer.

    Thresholds that were fitted with one scorer are meaningless with another.
    """
    scores = [scorer.score(text) for text in _PROBES]
    found: list[object] = [round(score.value, 6) for score in scores]
    found += [
        (tier, round(estimate.good, 6)) for score in scores for tier, estimate in score.estimates.items()
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


_PROBES = (
    "Hello!",
    "What is the capital of France?",
    "Prove that there are infinitely many primes.",
    "Write a Python function that merges two sorted lists.",
    "A train leaves at 9:40 and arrives at 12:05. How long does it travel?",
)


def sigmoid(log_odds: float) -> float:
    """Return the probability for *log_odds*, without overflow at either end."""

    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    return math.exp(log_odds) / (1 + math.exp(log_odds))
