"""The expected time of an answer follows the recent answers."""

from __future__ import annotations

import pytest

from headrace.router.state.tier_pace import TierPace


def test_the_pace_is_that_of_the_last_answers() -> None:
    pace = TierPace()
    assert pace.answer_seconds(100, now=0) == 0

    pace.record(0, first_seconds=1.0, decode_seconds=9.9, tokens=100)
    assert pace.answer_seconds(None, now=0) == pytest.approx(11.0)
    assert pace.answer_seconds(10, now=0) == pytest.approx(2.0)

    for _ in range(100):
        pace.record(0, first_seconds=0.1, decode_seconds=0.99, tokens=100)
    assert pace.answer_seconds(None, now=0) == pytest.approx(1.1, abs=0.01)


def test_only_new_tokens_count() -> None:
    """An answer of 100 tokens, 98 of which came with the request, took its time for two tokens."""
    pace = TierPace()
    pace.record(0, first_seconds=0.5, decode_seconds=0.111, tokens=100, timed_tokens=2)

    assert pace.answer_seconds(None, now=0) == pytest.approx(0.5 + 0.111 * 100)


def test_an_answer_without_new_tokens_does_not_count() -> None:
    pace = TierPace()
    pace.record(0, first_seconds=0.0, decode_seconds=0.0, tokens=100, timed_tokens=0)

    assert pace.answer_seconds(None, now=0) == 0


def test_an_answer_of_one_token_does_not_change_the_decode_speed() -> None:
    pace = TierPace()
    pace.record(0, first_seconds=0.1, decode_seconds=0.0, tokens=1)
    for _ in range(50):
        pace.record(0, first_seconds=0.1, decode_seconds=9.9, tokens=100)
        pace.record(0, first_seconds=0.1, decode_seconds=0.0, tokens=1)

    assert pace.answer_seconds(100, now=0) > 0.1 * 40
    assert pace.answer_seconds(1, now=0) == pytest.approx(0.2)


def test_a_tier_that_was_slow_is_tried_again_after_a_while() -> None:
    """Otherwise it would never be chosen, and the router could not measure that it is fast again."""
    pace = TierPace()
    pace.record(0, first_seconds=60.0, decode_seconds=0.0, tokens=1)

    assert pace.answer_seconds(None, now=0) == pytest.approx(60)
    assert pace.answer_seconds(None, now=300) < 0.1
