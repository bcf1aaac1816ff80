"""Figures over many prompts."""

from __future__ import annotations

import pytest
from rich.console import Console

from headrace.cli.answers import Answer
from headrace.cli.demo.summary import Outcome, summarise, summary_table, unasked
from headrace.cli.launch.tiers import TierSpec

OUTCOMES = [
    Outcome("fact", Answer(tier="small", tokens=10, first_token=0.2, finish="stop")),
    Outcome("code", Answer(tier="large", tokens=50, first_token=0.6, finish="length")),
    Outcome("fact", Answer(tier="small", tokens=5, first_token=0.3, finish=""), failure="the worker is lost"),
    Outcome("fact", Answer(), failure="queue is full"),
]


def test_requests_and_tokens_are_counted_by_tier() -> None:
    summary = summarise(OUTCOMES, elapsed=10.0)

    assert summary.requests == {"small": 2, "large": 1}
    assert summary.tokens == {"small": 15, "large": 50}
    assert summary.failures == 2
    assert summary.tokens_per_second == pytest.approx(6.5)


def test_an_answer_without_finish_is_a_failure() -> None:
    assert summarise([Outcome("fact", Answer(tier="small", tokens=3))], 1.0).failures == 1


def test_the_table_shows_median_and_longest() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(summary_table(summarise(OUTCOMES, elapsed=10.0)))

    assert "300 ms" in captured.get()
    assert "600 ms" in captured.get()


def test_an_empty_summary_is_valid() -> None:
    summary = summarise([], 0.0)

    assert summary.tokens_per_second == 0
    assert summary_table(summary).row_count == 3


def test_tiers_that_no_prompt_was_sent_to_are_found_in_their_order() -> None:
    tiers = [TierSpec(name) for name in ("tiny", "small", "large", "huge")]

    assert unasked(tiers, OUTCOMES) == ["tiny", "huge"]
    assert unasked(tiers[1:3], OUTCOMES) == []
