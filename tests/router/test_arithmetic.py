"""Equations are read where they are certain, and left alone where they are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.router.arithmetic import equations, final_answers


@pytest.mark.parametrize(
    "text",
    [
        "3 * 12 = 36",
        "5 apples + 3 apples = 8 apples",
        "She pays $5.50 x 2 = $11.",
        "$3 \\times 12 = 36$",
        "\\frac{36}{4} = 9",
        "20% of 50 = 10",
        "(2 + 3) * 4 = 20",
        "3*4=<<3*4=12>>12",
        "30 / 120 = 25%",
        "1,200 - 200 = 1,000",
        "50 / 3 = 16.67",
        "50 / 3 = 16.6",
        "100 - 20% = 80",
        "So that is 8 + 2 + 5 = 15 in all.",
        "- 8 kg + 2 kg = 10 kg",
        "* Rose: 3 * 4 = 12",
    ],
)
def test_what_adds_up_holds(text: str) -> None:
    assert [equation.holds for equation in equations(text)] == [True]


@pytest.mark.parametrize(
    "text", ["3 * 12 = 35", "5 apples + 3 apples = 9 apples", "20% of 50 = 5", "50 / 3 = 16.5"]
)
def test_what_does_not_add_up_is_found(text: str) -> None:
    assert [equation.holds for equation in equations(text)] == [False]


@pytest.mark.parametrize(
    "text",
    [
        *("x = 5", "3x + 2 = 11", "half of 10 + 2 = 7", "Total = 12", "1 / 0 = 0", "a == b"),
        *("- 880 g = 880 g", "7:05 + 40 = 7:45", "At 8:15 + 40 minutes = 8:55.", "3 + 4 = 7:12"),
    ],
)
def test_what_is_not_certain_is_passed_over(text: str) -> None:
    assert equations(text) == []


@given(st.integers(0, 999), st.sampled_from("+-*"), st.integers(0, 999), st.integers(-3, 3))
def test_an_equation_holds_exactly_when_it_does(left: int, sign: str, right: int, error: int) -> None:
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    # The slack for rounding is half a unit and one in ten thousand; within it nothing is claimed.
    if error and abs(error) <= 0.51 + 1e-4 * abs(value):
        return

    (equation,) = equations(f"{left} {sign} {right} = {value + error}")

    assert equation.holds == (error == 0) or value in (0, -error)


@given(st.text(alphabet="0123456789+-*/()=x.,% \n$ab^", max_size=80))
def test_no_text_upsets_the_reader(text: str) -> None:
    equations(text)
    final_answers(text)


def test_marked_answers_are_read_in_order() -> None:
    assert final_answers("The answer is 7.\nSo \\boxed{8}.\n#### 1,009") == [7.0, 8.0, 1009.0]


def test_a_line_that_runs_on_is_read_as_it_is_meant() -> None:
    assert [equation.holds for equation in equations("5 * 2 = 10 + 3 = 13")] == [True, True]
    assert [equation.holds for equation in equations("5 * 2 = 11 + 3 = 14")] == [False, True]
