"""The score is a share-by-share account of the text."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from headrace.router.complexity import FeatureScorer

scorer = FeatureScorer()

EASY = [
    "Hello!",
    "Thanks a lot",
    "What is the capital of France?",
    "Classify the sentiment as positive or negative: I loved this film.",
    "Translate 'good morning' into French.",
]
HARD = [
    "Write a Python function that merges two sorted linked lists and explain its complexity.",
    "A train leaves at 9:40 and travels 180 km at 72 km per hour. When does it arrive?",
    "Compare TCP and UDP and explain the trade-offs for a video call.",
    "Prove step by step that the square root of 2 is irrational.",
]


@given(st.text(max_size=2000))
def test_the_score_is_in_range_and_its_shares_add_up(text: str) -> None:
    score = scorer.score(text)

    assert 0 < score.value < 1
    log_odds = score.bias + sum(feature.log_odds for feature in score.features)
    assert math.isclose(math.log(score.value / (1 - score.value)), log_odds, abs_tol=1e-9)
    assert all(0 <= feature.value <= 1 for feature in score.features)


@given(st.text(max_size=300))
def test_the_same_text_has_the_same_score(text: str) -> None:
    assert scorer.score(text) == scorer.score(text)


def test_greetings_facts_and_plain_tasks_score_below_code_arithmetic_and_reasoning() -> None:
    assert max(scorer.score(text).value for text in EASY) < 0.5
    assert min(scorer.score(text).value for text in HARD) > 0.5


def test_a_huge_prompt_is_scored_by_its_beginning() -> None:
    text = "word " * 4000

    assert scorer.score(text + "x" * 1_000_000) == scorer.score(text + "y" * 1_000_000)
