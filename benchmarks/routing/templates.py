"""Make questions with checkable answers from templates, to fit and measure the draft check.

The check is fitted to eleven families of graded difficulty. The families of `HELD_OUT`, arithmetic stories of
several steps, only measure it. Everything is drawn from a seed. Questions that resemble one of
`questions.jsonl`, which the live evaluation uses, are left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from benchmarks.routing import arithmetic_templates as arithmetic
from benchmarks.routing import text_templates as text
from benchmarks.routing.arithmetic_templates import Made
from benchmarks.routing.questions import Question, load
from benchmarks.routing.stories import short_story, story

HELD_OUT = ("word_problems", "short_word_problems")  # evaluation only


def questions(per_family: int = 70, word_problems: int = 120, seed: int = 1) -> list[Question]:
    """Return questions, shuffled, so that any prefix is a fair sample; the same for the same arguments."""
    live = [(_words(question.prompt), question.answers) for question in load()]
    made: list[Question] = []
    for family, makers in _FAMILIES.items():
        draw = random.Random(f"{seed} {family}")
        wanted = word_problems if family in HELD_OUT else per_family
        prompts: set[str] = set()
        for turn in range(50 * wanted):
            prompt, kind, answers = makers[turn % len(makers)](draw)
            if prompt in prompts or _resembles(prompt, answers, live):
                continue
            prompts.add(prompt)
            made.append(Question(f"{family}-{len(prompts):03}", family, prompt, kind, tuple(answers)))
            if len(prompts) == wanted:
                break
    random.Random(seed).shuffle(made)
    return made


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def _resembles(prompt: str, answers: list[str], live: list[tuple[frozenset[str], tuple[str, ...]]]) -> bool:
    words = _words(prompt)
    return any(
        set(answers) & set(others) and len(words & asked) >= 0.6 * len(words | asked)
        for asked, others in live
    )


_FAMILIES: dict[str, list[Callable[[random.Random], Made]]] = {
    "arithmetic": [
        arithmetic.sum_question,
        arithmetic.product_question,
        arithmetic.expression_question,
        arithmetic.expression_question,
        arithmetic.share_question,
        arithmetic.statistics_question,
    ],
    "units": [
        arithmetic.unit_question,
        arithmetic.unit_question,
        arithmetic.mixed_unit_question,
        arithmetic.chained_unit_question,
    ],
    "dates": [
        arithmetic.weekday_question,
        arithmetic.calendar_question,
        arithmetic.year_question,
        arithmetic.clock_question,
    ],
    "facts": [text.fact_question],
    "choices": [text.choice_question, text.choice_question, text.odd_one_question],
    "strings": [text.string_question, text.string_question, text.string_question, text.sorted_words_question],
    "extraction": [text.passage_question, text.passage_question, text.record_question],
    "formats": [text.format_question],
    "comparisons": [text.compare_question, text.relation_question],
    "sequences": [text.sequence_question],
    "code": [text.code_question],
    "word_problems": [story],
    "short_word_problems": [short_story],
}
