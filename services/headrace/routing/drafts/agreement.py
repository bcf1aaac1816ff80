"""Compare the results of two answers to one prompt: a number, a choice, a few words, or code.

Sampled answers agree if the model knows the answer, and differ if it guesses (Wang et al., Self-Consistency
Improves Chain of Thought Reasoning, arXiv 2203.11171). Only the ends of the answers are compared, because the
steps before may differ. Pure functions; `check.py` weighs the result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from headrace.routing.drafts import arithmetic

# The letter of a choice in an answer.
CHOSEN = re.compile(r"(?:^|[\s(*\"'])\(?([A-J])(?=[).:,*]|\s*$|\s+is\b)", re.MULTILINE)
_FENCE = re.compile(r"```\w*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_SHORT = 25  # words; a longer answer is compared by its last sentence
_FILLERS = frozenset(
    [
        *("a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "is"),
        *("are", "was", "were", "be", "it", "its", "this", "that", "these", "there", "which"),
        *("who", "whom", "answer", "so", "therefore", "thus", "would", "will", "has", "have", "had"),
        *("with", "for", "by", "as", "from", "correct", "final", "called"),
    ]
)


def agreement(prompt: str, draft: str, samples: Sequence[str], *, number: bool, choice: bool) -> float | None:
    """Return how far *samples* agree with *draft*, 0 to 1; None if no sample can be compared.

    number, choice   whether the prompt asks for a number, or to choose between letters
    """
    similarities = [
        _similarity(prompt, draft, sample, number=number, choice=choice)
        for sample in samples
        if sample.strip() and draft.strip()
    ]
    compared = [value for value in similarities if value is not None]
    return sum(compared) / len(compared) if compared else None


def _similarity(prompt: str, one: str, other: str, *, number: bool, choice: bool) -> float | None:
    if choice:
        chosen = [CHOSEN.findall(text)[-1:] for text in (one, other)]
        if all(chosen):
            return float(chosen[0] == chosen[1])
    if number:
        values = [_number(text) for text in (one, other)]
        if None in values:
            return 0.0 if values[0] != values[1] else None
        return float(values[0] == values[1])
    blocks = [_FENCE.search(text) for text in (one, other)]
    if any(blocks):
        return _overlap(
            *(_TOKEN.findall(b.group(1) if b else t) for b, t in zip(blocks, (one, other), strict=True))
        )
    asked = set(_words(prompt))
    words = [_words(_end(text)) for text in (one, other)]
    # Words of the question are not evidence, unless the answers contain no others.
    new = [[word for word in answer if word not in asked] for answer in words]
    return _overlap(*(new if any(new) else words))


def _number(text: str) -> float | None:
    """Return the number that *text* marks as its answer, or its last number, rounded to four decimals."""
    values = arithmetic.final_answers(text) or arithmetic.numbers(arithmetic.plain(text))
    return round(values[-1], 4) if values else None


def _end(text: str) -> str:
    """Return all of a short answer, and the last sentence of a long one."""
    if len(text.split()) <= _SHORT:
        return text
    sentences = [sentence for sentence in _SENTENCE.split(text.strip()) if _WORD.search(sentence)]
    return sentences[-1] if sentences else text


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in _FILLERS]


def _overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """Return the size of the intersection divided by the size of the union."""

    first, second = Counter(one), Counter(other)
    either = (first | second).total()
    return (first & second).total() / either if either else 1.0
