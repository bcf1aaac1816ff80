"""How long an answer would take is what the last ones took."""

from __future__ import annotations

import pytest

from headrace.router.state.tier_pace import Pace


def test_the_pace_is_that_of_the_last_answers() -> None:
    pace = Pace()
    assert pace.answer_seconds(100, now=0) == 0

    pace.note(0, first_seconds=1.0, decode_seconds=9.9, tokens=100)
    assert pace.answer_seconds(None, now=0) == pytest.approx(11.0)
    assert pace.answer_seconds(10, now=0) == pytest.approx(2.0)

    for _ in range(100):
        pace.note(0, first_seconds=0.1, decode_seconds=0.99, tokens=100)
    assert pace.answer_seconds(None, now=0) == pytest.approx(1.1, abs=0.01)


def test_only_new_tokens_over_new_time_teach() -> None:
    """An answer of 100 tokens of which 98 came with the request took its time for two."""
    pace = Pace()
    pace.note(0, first_seconds=0.5, decode_seconds=0.111, tokens=100, timed_tokens=2)

    assert pace.answer_seconds(None, now=0) == pytest.approx(0.5 + 0.111 * 100)


def test_an_answer_that_brought_nothing_new_teaches_nothing() -> None:
    pace = Pace()
    pace.note(0, first_seconds=0.0, decode_seconds=0.0, tokens=100, timed_tokens=0)

    assert pace.answer_seconds(None, now=0) == 0


def test_an_answer_of_one_token_does_not_say_how_fast_others_follow() -> None:
    pace = Pace()
    pace.note(0, first_seconds=0.1, decode_seconds=0.0, tokens=1)
    for _ in range(50):
        pace.note(0, first_seconds=0.1, decode_seconds=9.9, tokens=100)
        pace.note(0, first_seconds=0.1, decode_seconds=0.0, tokens=1)

    assert pace.answer_seconds(100, now=0) > 0.1 * 40
    assert pace.answer_seconds(1, now=0) == pytest.approx(0.2)


def test_a_tier_that_was_slow_is_tried_again_after_a_while() -> None:
    """Or it would never be chosen, and nobody would learn that it is quick again."""
    pace = Pace()
    pace.note(0, first_seconds=60.0, decode_seconds=0.0, tokens=1)

    assert pace.answer_seconds(None, now=0) == pytest.approx(60)
    assert pace.answer_seconds(None, now=300) < 0.1
