"""Compare what two answers to one prompt come to: a number, a choice, a few words, or code.

Samples of a model that knows an answer agree; where it guesses they scatter (Wang et al., Self-Consistency
Improves Chain of Thought Reasoning, arXiv 2203.11171). Only what the answers end with is compared, for the
way there may differ. Pure functions; what agreement is worth is `draft_check.py`'s to say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from headrace.routing.drafts import arithmetic

# The letter of a choice, where an answer gives one.
CHOSEN = re.compile(r"(?:^|[\s(*\"'])\(?([A-J])(?=[).:,*]|\s*$|\s+is\b)", re.MULTILINE)
_FENCE = re.compile(r"```\w*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_SHORT = 25  # words; a longer answer is compared by its last sentence
_FILLING = frozenset(
    [
        *("a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "is"),
        *("are", "was", "were", "be", "it", "its", "this", "that", "these", "there", "which"),
        *("who", "whom", "answer", "so", "therefore", "thus", "would", "will", "has", "have", "had"),
        *("with", "for", "by", "as", "from", "correct", "final", "called"),
    ]
)


def agreement(prompt: str, draft: str, samples: Sequence[str], *, number: bool, choice: bool) -> float | None:
    """How far *samples* say what *draft* says, 0 to 1; None if no two of them can be compared.

    number, choice   whether the prompt asks for a number, or to choose between letters
    """
    said = [
        _alike(prompt, draft, sample, number=number, choice=choice)
        for sample in samples
        if sample.strip() and draft.strip()
    ]
    compared = [value for value in said if value is not None]
    return sum(compared) / len(compared) if compared else None


def _alike(prompt: str, one: str, other: str, *, number: bool, choice: bool) -> float | None:
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
    # What the question said already tells nothing, unless the answers hold nothing else.
    new = [[word for word in said if word not in asked] for said in words]
    return _overlap(*(new if any(new) else words))


def _number(text: str) -> float | None:
    """The number that *text* marks as its answer, or its last one, to four digits after the point."""
    values = arithmetic.final_answers(text) or arithmetic.numbers(arithmetic.plain(text))
    return round(values[-1], 4) if values else None


def _end(text: str) -> str:
    """All of a short answer, the last sentence of a long one."""
    if len(text.split()) <= _SHORT:
        return text
    sentences = [sentence for sentence in _SENTENCE.split(text.strip()) if _WORD.search(sentence)]
    return sentences[-1] if sentences else text


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in _FILLING]


def _overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """What the two have in common, of all that either has."""
    first, second = Counter(one), Counter(other)
    either = (first | second).total()
    return (first & second).total() / either if either else 1.0
