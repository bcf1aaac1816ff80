"""Equations are read if they are certain, and skipped if not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.drafts.agreement import agreement
from headrace.routing.drafts.arithmetic import equations, final_answers, numbers, plain
from headrace.routing.drafts.features import measure
from headrace.routing.scoring.prompt_features import measure as measure_prompt


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
        *("(-2)^3 = -8", "(-3)^2 = 9", "-2^2 = -4", "-3 * -4 = 12", "5 - -3 = 8", "--3 + 5 = 8"),
        *("1.1^100 = 13780.61", "2^-3 = 0.125", "2**-1 = 0.5", "2 ** 3 = 8", "2^3^2 = 512", "2^{3+1} = 16"),
        *("3² = 9", "10⁻² = 0.01", "1.0042^360 = 4.52", "4^(1/2) = 2", "100 * 1.05^10 = 162.89"),
        *("3 - 5 = −2", "−5 + 8 = 3", "3 * 2 = \u00a06", "3 - 5 = -\u00a02", "10\u00a0000 + 5 = 10\u202f005"),
        *("2^64 = 18446744073709551616", "999999 * 999999 = 999998000001", "10^18 + 1 = 1000000000000000001"),
        *("10% + 5% = 15%", "200 + 10% = 220", "50 % of 80 = 40", "1/8 = .125", "5/8 = 0.63", "1/8 = 0.1"),
        *("2\\frac{1}{2} + 1 = 3.5", "5 3/4 + 1 = 6.75", "[2 + 3] * 4 = 20", "**2** + **3** = **5**"),
        *("5 cm² + 3 cm² = 8 cm²", "5 cm^2 + 3 cm^2 = 8 cm^2", "5 times 3 + 2 = 17", "- 5 + 8 = 3"),
    ],
)
def test_correct_equations_hold(text: str) -> None:
    assert [equation.holds for equation in equations(text)] == [True]


@pytest.mark.parametrize(
    "text",
    [
        *("3 * 12 = 35", "5 apples + 3 apples = 9 apples", "20% of 50 = 5", "50 / 3 = 16.5"),
        *("(-2)^3 = 8", "2^-3 = 8", "2**3 = 9", "1.1^100 = 13781.61", "-3 * -4 = -12", "5/8 = 0.64"),
        *("2^64 = 18446744073709551617", "999999 * 999999 = 999998000002", "2^20 = 1048577"),
        *("10% + 5% = 20%", "1 + 1 = 200", "50 + 50 = 1"),
    ],
)
def test_wrong_equations_are_found(text: str) -> None:
    assert [equation.holds for equation in equations(text)] == [False]


@pytest.mark.parametrize(
    "text",
    [
        *("x = 5", "3x + 2 = 11", "half of 10 + 2 = 7", "Total = 12", "1 / 0 = 0", "a == b"),
        *(
            "√16 + 3 = 7",
            "|-3| + 2 = 5",
            "log 100 + 1 = 3",
            "10 000 + 5 = 10005",
            "3,5 + 2 = 5,5",
            "0^-1 = 0",
        ),
        *(
            "(-8)^(1/3) = -2",
            "9^9^9^9 = 1",
            "2 * 500000 = 1 million",
            "2^20 = 1.05e6",
            "11/4 = 2 remainder 3",
        ),
        *(
            "5 + 3/4 = 5 3/4",
            "200 + 10% + 5% = 3",
            "5 **7** = 2",
            "9" * 50 + " + 1 = 2",
            "3 divided by 3 + 2 = 3",
        ),
        *("- 880 g = 880 g", "7:05 + 40 = 7:45", "At 8:15 + 40 minutes = 8:55.", "3 + 4 = 7:12"),
    ],
)
def test_uncertain_equations_are_skipped(text: str) -> None:
    assert equations(text) == []


@given(st.integers(0, 999), st.sampled_from("+-*"), st.integers(0, 999), st.integers(-3, 3))
def test_an_equation_holds_if_and_only_if_it_is_correct(left: int, sign: str, right: int, error: int) -> None:
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    (equation,) = equations(f"{left} {sign} {right} = {value + error}")

    assert equation.holds == (error == 0)


@pytest.mark.parametrize(
    "text", ["Calculate --3 + 5", "-$-5", "= -\u00a05", "so 6 = -\u00a05", "4 = -\u20095", "-" * 99 + "1"]
)
def test_ambiguous_signs_raise_nothing(text: str) -> None:
    for word in (text, f"3 * 2 {text}", f"The answer is {text}"):
        equations(word)
        numbers(word)
        numbers(plain(word))
        final_answers(word)


def test_numbers_after_doubled_signs_are_read() -> None:
    assert numbers("Calculate --3 + 5") == [-3.0, 5.0]
    assert numbers("-$-5 and -$7 and $-8 and $9") == [-5.0, -7.0, -8.0, 9.0]
    assert numbers("9" * 400) == [], "so many digits are not a number"


# What may stand in and around numbers, and what Python's own readers of numbers refuse.
MARKS = "0123456789+-*/()=x.,:% \n$€£ab^|[]{}\\√−–×÷·²³⁻⅓½٣५\u00a0\u2009\u202f\ud7ff"


@given(st.text(max_size=80) | st.text(alphabet=MARKS, max_size=80))
def test_no_text_raises(text: str) -> None:
    equations(text)
    numbers(plain(text))
    final_answers(text)
    final_answers(f"The answer is {text}")


@given(
    st.text(alphabet=MARKS, max_size=60) | st.text(max_size=60),
    st.text(alphabet=MARKS, max_size=120) | st.text(max_size=120),
    st.text(alphabet=MARKS, max_size=60),
)
def test_no_prompt_draft_or_sample_makes_the_check_raise(prompt: str, draft: str, sample: str) -> None:
    for question in (
        prompt,
        f"Calculate {prompt}",
        f"Choose: {prompt}\nA. x\nB. y",
        f"Write a function {prompt}",
    ):
        found = measure(question, draft, finished=True, logprobs=[-0.1], samples=[sample])

        assert all(0 <= value <= 1 for value in found.values())
        assert all(0 <= value <= 1 for value in measure_prompt(question).values())
    for number, choice in ((True, False), (False, True), (False, False)):
        agreement(prompt, draft, [sample, draft], number=number, choice=choice)


def test_the_number_of_equations_read_is_bounded() -> None:
    assert len(equations("1+1=2\n" * 3000)) == 256


def test_rounded_results_may_be_used_again() -> None:
    assert [found.holds for found in equations("5000 / 300 = 16.67. So 16.67 * 300 = 5000.")] == [True, True]
    assert [found.holds for found in equations("So 16.67 * 300 = 5000.")] == [False]


def test_marked_answers_are_read_in_order() -> None:
    assert final_answers("The answer is 7.\nSo \\boxed{8}.\n#### 1,009") == [7.0, 8.0, 1009.0]


def test_chained_equations_are_read_as_intended() -> None:
    assert [equation.holds for equation in equations("5 * 2 = 10 + 3 = 13")] == [True, True]
    assert [equation.holds for equation in equations("5 * 2 = 11 + 3 = 14")] == [False, True]
