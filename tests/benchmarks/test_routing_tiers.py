"""The tiers of the live experiment with a calculator."""

from __future__ import annotations

import pytest

from benchmarks.routing.calculator import calculated
from benchmarks.routing.live_tiers import TIERS, training_rows


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("What is 17 times 23? Answer with the number only.", "391"),
        ("Compute (8 - 3) * (2 + 6).", "40"),
        ("What is the capital of France?", "I can only calculate."),
        ("", "I can only calculate."),
    ],
)
def test_the_calculator_evaluates_arithmetic_and_declines_the_rest(prompt: str, answer: str) -> None:
    assert calculated(prompt) == answer


def test_no_tier_is_the_best_at_every_kind_of_training_question() -> None:
    rows = training_rows()
    right = {
        tier: {row["prompt"] for row in rows if row[f"{tier}_ok"]}
        - {row["prompt"] for row in rows for other in TIERS if other != tier and row[f"{other}_ok"]}
        for tier in TIERS
    }

    assert all(right.values()), "each tier alone is right on some questions"
