"""Score how hard a prompt is to answer.

The score runs from 0 (a greeting) to 1 (needs the largest model). It reads the text and nothing else, so
the router can afford it on every request. `policy.py` turns scores into tiers; this module does not know
which tiers exist.
"""

from __future__ import annotations

import hashlib
import math
import re
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
_MAX_CHARACTERS = 20_000  # what lies beyond does not make a prompt harder, only slower to read

_DIGIT = re.compile(r"\d")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_CODE = re.compile(
    r"```|\b(?:python|javascript|typescript|java|rust|golang|c\+\+|sql|bash|html|css|regex|json|api|async|"
    r"function|class|method|recursi\w+|algorithm|code|program|script|implement|refactor|debug|compile|"
    r"unit tests?|stack ?trace|exception|linked list|binary (?:tree|search)|big-?o)\b|"
    r"\bdef \w+\(|\w+\(\)|[{};]\s*$|=>|==|!=|</\w+>",
    re.IGNORECASE | re.MULTILINE,
)
_REASONING = re.compile(
    r"\b(?:why|prove|proof|derive|explain|analy[sz]e|compare|contrast|evaluate|justify|argue|critique|reason|"
    r"trade-?offs?|pros and cons|step[- ]by[- ]step|implications?|consequences?|strategy|design|plan|"
    r"hypothes\w+|infer|deduce|therefore|suppose|assume|if and only if|what would happen|"
    r"how (?:does|do|can|would))\b",
    re.IGNORECASE,
)
_ARITHMETIC = re.compile(
    r"\d+(?:\.\d+)?\s*(?:[-+*/^=×÷%]|percent|times|plus|minus|divided)|"
    r"\b(?:calculate|compute|solve|equation|integral|derivative|probability|percent(?:age)?|average|ratio|"
    r"how (?:many|much|long|far|fast|old)|total|remainder|area|volume|per (?:hour|day|week|km|kg))\b|\d+",
    re.IGNORECASE,
)
_CONSTRAINT = re.compile(
    r"\b(?:must|exactly|at least|at most|no more than|without using|ensure|requirements?|constraints?|"
    r"format|include|avoid|each|respectively)\b|^\s*(?:[-*•]|\d+[.)])\s",
    re.IGNORECASE | re.MULTILINE,
)
_PLAIN_TASK = re.compile(
    r"\b(?:classify|label|categori[sz]e|sentiment|positive or negative|true or false|yes or no|spam|"
    r"translate|"
    r"summari[sz]e|summary|tl;?dr|rephrase|paraphrase|rewrite|correct the (?:spelling|grammar)|extract|"
    r"in one (?:word|sentence)|one-word|synonyms?|antonyms?|name (?:a|an|one|two|three)|"
    r"list (?:two|three))\b",
    re.IGNORECASE,
)
_SMALL_TALK = re.compile(
    r"^\W*(?:hi|hello|hey|howdy|yo|greetings|good (?:morning|afternoon|evening|night)|thanks?|thank you|bye|"
    r"goodbye|how are you|what'?s up|nice to meet you|happy \w+day)\b",
    re.IGNORECASE,
)
_PLAIN_FACT = re.compile(
    r"^\W*(?:what(?:'s| is| are| was)|who(?:'s| is| was| wrote| invented| painted)|"
    r"where(?:'s| is)|when (?:is|was|did)|"
    r"which \w+ (?:is|has|was)|define|spell)\b",
    re.IGNORECASE,
)


class FeatureScorer:
    """A hand-made linear model over features of the text.

    Each feature saturates at 1, each weight is the most that it can add in log-odds. The weights were set
    by hand for mixed chat traffic and fitted to nothing; a learned scorer takes its place by the same seam.
    """

    bias = -0.9
    weights: tuple[tuple[str, float], ...] = (
        ("length", 1.6),
        ("code", 3.2),
        ("reasoning", 2.2),
        ("arithmetic", 2.2),
        ("constraints", 1.0),
        ("long_words", 0.8),
        ("questions", 0.5),
        ("plain_task", -2.2),
        ("plain_fact", -1.2),
        ("small_talk", -1.8),
    )

    def score(self, text: str) -> Score:
        """Score the text of a prompt, any length."""
        values = measure(text)
        features = tuple(Feature(name, values[name], weight * values[name]) for name, weight in self.weights)
        log_odds = self.bias + sum(feature.log_odds for feature in features)
        return Score(sigmoid(log_odds), self.bias, features)


def measure(text: str) -> dict[str, float]:
    """Every feature's strength, 0 to 1."""
    text = text[:_MAX_CHARACTERS]
    words = _WORD.findall(text)
    count = len(words)
    short = count <= 25
    return {
        # 0 at ten words, 1 at about four hundred: a question's context counts less than its doubling.
        "length": _between(math.log(max(count, 1)), math.log(10), math.log(400)),
        "code": _saturate(_CODE, text, 3),
        "reasoning": _saturate(_REASONING, text, 2),
        "arithmetic": _saturate(_ARITHMETIC, text, 4),
        "constraints": _saturate(_CONSTRAINT, text, 4),
        "long_words": _between(sum(len(word) > 8 for word in words) / max(count, 1), 0.1, 0.4),
        "questions": _between(text.count("?"), 1, 4),
        "plain_task": 1.0 if _PLAIN_TASK.search(text) else 0.0,
        # "What is" opens a plain question only while nothing long follows, and nothing to compute.
        "plain_fact": 1.0 if short and not _DIGIT.search(text) and _PLAIN_FACT.search(text) else 0.0,
        "small_talk": 1.0 if short and _SMALL_TALK.search(text) else 0.0,
    }


def sigmoid(log_odds: float) -> float:
    """The probability of these log-odds; safe at both ends."""
    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    return math.exp(log_odds) / (1 + math.exp(log_odds))


def _saturate(pattern: re.Pattern[str], text: str, full: int) -> float:
    """How many matches there are, of the *full* that count as all."""
    found = 0
    for _ in pattern.finditer(text):
        found += 1
        if found == full:
            return 1.0
    return found / full


def _between(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)
