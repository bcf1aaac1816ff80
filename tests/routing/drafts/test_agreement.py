"""Two answers are compared by their results, not by their steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.drafts.agreement import agreement

CODE = "```python\ndef double(x):\n    return 2 * x\n```"


def alike(prompt: str, one: str, other: str, *, number: bool = False, choice: bool = False) -> float | None:
    return agreement(prompt, one, [other], number=number, choice=choice)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("4 * 6 = 24, and 24 - 3 = 21. The answer is 21.", "There are 21.", 1.0),
        ("The answer is 21.", "The answer is 21.0, out of 24.", 1.0),
        ("The answer is $1,200.", "1200", 1.0),
        ("The answer is 21.", "The answer is 24.", 0.0),
        ("The answer is 21.", "I cannot tell.", 0.0),
        ("I cannot tell.", "Nobody knows.", None),
    ],
)
def test_numbers_agree_by_value(one: str, other: str, expected: float | None) -> None:
    assert alike("How many are left?", one, other, number=True) == expected


@pytest.mark.parametrize(
    ("other", "expected"), [("The answer is B.", 1.0), ("(b) no: C) is right", 0.0), ("B", 1.0), ("A", 0.0)]
)
def test_choices_agree_by_their_letter(other: str, expected: float) -> None:
    assert alike("Which?\nA. x\nB. y\nC. z", "B. y", other, choice=True) == expected


def test_short_answers_are_compared_by_words_that_are_not_in_the_question() -> None:
    asked = "What is the capital of Cuba?"

    assert alike(asked, "The capital of Cuba is Havana.", "Havana") == 1.0
    assert alike(asked, "The capital of Cuba is Havana.", "The capital of Cuba is Santiago.") == 0.0


def test_if_the_question_has_all_words_all_words_are_compared() -> None:
    asked = "Rosa is taller than Jonas. Who is the tallest, Rosa or Jonas?"

    assert alike(asked, "Rosa.", "Rosa") == 1.0
    assert alike(asked, "Rosa.", "Jonas.") == 0.0


def test_long_answers_agree_by_their_last_sentence() -> None:
    way = "First one polls at the map, then at the compass, and then one thinks it over for a while. "

    assert alike("Where is it?", way * 2 + "So it is in Norway.", "It is in Norway.") == 1.0


def test_code_agrees_by_its_tokens() -> None:
    other = CODE.replace("2 * x", "x + x")

    assert alike("Write double.", CODE, f"Here it is:\n{CODE}\nIt doubles.") == 1.0
    assert 0.5 < (alike("Write double.", CODE, other) or 0) < 1.0


@given(st.text(max_size=80), st.text(max_size=200), st.text(max_size=200), st.booleans(), st.booleans())
def test_agreement_is_symmetric_between_0_and_1_and_1_with_itself(
    prompt: str, one: str, other: str, number: bool, choice: bool
) -> None:
    found = alike(prompt, one, other, number=number, choice=choice)

    assert found is None or 0 <= found <= 1
    assert found == alike(prompt, other, one, number=number, choice=choice)
    assert alike(prompt, one, one, number=number, choice=choice) in (None, 1.0)
