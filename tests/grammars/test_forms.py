"""Each form becomes a grammar whose texts have that form, alone and inside of another grammar."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.grammars import forms
from headrace.grammars.problems import FormProblem
from tests.grammars.walks import accepts, walk

SEEDS = st.integers(0, 2**32)
PATTERNS = [
    "a/b",
    r"\d{2,4}-[^x]",
    "(?i)yes|no",
    'é+[/"\\\\]',
    "(a|bc)*",
    r"(?s).\n",
    "a\nb",
    "[\u4e00-\u4e20]{2}",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_match_a_regular_expression_as_a_whole(pattern: str) -> None:
    for seed in range(20):
        answer = walk(forms.regex(pattern).text, random.Random(seed))
        assert answer is None or re.fullmatch(pattern, answer)

    assert not accepts(forms.regex("ab").text, "xab")
    assert not accepts(forms.regex("ab").text, "abx")


def test_digits_of_a_regular_expression_are_0_to_9() -> None:
    grammar = forms.regex(r"\d\D").text

    assert accepts(grammar, "7\N{ARABIC-INDIC DIGIT SEVEN}")
    assert not accepts(grammar, "\N{ARABIC-INDIC DIGIT SEVEN}x")


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, unique=True))
def test_an_answer_is_one_of_the_choices(texts: list[str]) -> None:
    grammar = forms.choices(texts).text

    assert all(accepts(grammar, text) for text in texts)
    assert walk(grammar, random.Random(0)) in texts
    assert not accepts(grammar, texts[0] + "?") or texts[0] + "?" in texts


@given(seed=SEEDS)
def test_any_json_object_is_an_object(seed: int) -> None:
    answer = walk(forms.json_object().text, random.Random(seed))

    assert answer is None or isinstance(json.loads(answer), dict)


def test_a_text_of_a_lark_grammar_is_what_its_start_derives() -> None:
    grammar = forms.lark('start: greeting ", " NAME\ngreeting: "hi" | "bye"\nNAME: /[A-Z][a-z]+/').text

    assert accepts(grammar, "bye, Ada")
    assert not accepts(grammar, "ciao, Ada")


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (
            forms.json_schema_grammar('{"type": "object", "additionalProperties": {"type": "null"}}'),
            '{"é": null}',
        ),
        (forms.json_object(), '{"a": [1, 2]}'),
        (forms.regex("a/b|(?i)C"), "c"),
        (forms.choices(['"', "\n"]), "\n"),
        (forms.lark("start: INNER\nINNER: /x{2}/"), "xx"),
    ],
)
def test_a_part_is_the_same_inside_of_another_grammar(part: forms.Part, text: str) -> None:
    whole = forms.to_text(f'start: {forms.literal("<é>")} @part "</>"', {"part": part})

    assert accepts(part.text, text)
    assert accepts(whole, f"<é>{text}</>")
    assert not accepts(whole, f"<é>{text}{text}</>")


@pytest.mark.parametrize(
    ("texts", "place"),
    [
        ([], ""),
        (["a"] * 1025, ""),
        (["a", ""], "/1"),
        (["a", "é" * 513], "/1"),
        (["a", "b", "a"], "/2"),
    ],
)
def test_choices_that_cannot_be_told_apart_or_are_too_many_are_rejected(texts: list[str], place: str) -> None:
    with pytest.raises(FormProblem) as caught:
        forms.choices(texts)

    assert caught.value.place == place


@pytest.mark.parametrize("text", ["", "x" * (16 * 1024 + 1), "é" * (8 * 1024 + 1)])
def test_sizes_of_regular_expressions_are_bounded(text: str) -> None:
    with pytest.raises(FormProblem):
        forms.regex(text)


@pytest.mark.parametrize("text", ["", "x" * (64 * 1024 + 1)])
def test_sizes_of_lark_grammars_are_bounded(text: str) -> None:
    with pytest.raises(FormProblem):
        forms.lark(text)
