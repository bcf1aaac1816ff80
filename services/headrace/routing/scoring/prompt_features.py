"""Measure the features of a prompt, each from 0 to 1.

The features describe the kind of text and how much it asks for. `scorer.py` turns them into an expected gain.
Measuring is deterministic and takes a fraction of a millisecond for any length: of a very long prompt only
the beginning and the end are read. Features that depend on single words come from `lexicon.py`. A regular
expression is not run on a text that contains none of the literals that its matches need: finding a literal
takes a hundredth of the time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from headrace.routing.scoring import lexicon
from headrace.routing.scoring.words import words_of

_MOST = 60  # words that are looked up to recognise the language
_FEWEST = 3  # fewer words do not show the language
_FOREIGN, _KNOWN = 0.1, 0.3  # shares of known words at which the language is in full doubt, and in none
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_STRUCTURE = re.compile(r"\n(?![a-z])")  # lines that are not prose
_SENTENCE_END = re.compile(r"[.!?](?=\s)")
_ASKING = frozenset(
    ("what", "who", "whom", "whose", "why", "how", "which", "where", "when", "is", "are", "was", "were")
)


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A regular expression, and what a text with something to find contains.

    needs   literals, of which it contains at least one; a string stands for its characters. Empty: unknown
    """

    regex: re.Pattern[str]
    needs: Sequence[str] = ()

    def matches(self, text: str) -> Iterator[re.Match[str]]:
        """Return the matches in *text*."""
        if self.needs and not _contains_any(text, self.needs):
            return iter(())
        return self.regex.finditer(text)


# The ways to write choices: on lines of their own, or in a row. A text with choices has at least two.
_OPTIONS = (
    _Pattern(re.compile(r"^\(?([a-j])[).:] (\S.*)$", re.MULTILINE), "\n"),
    _Pattern(
        re.compile(r"(?:(?<=\s)|^)\(?([a-j])[).]\s+([^\n]+?)(?=\s\(?[a-j][).]\s|$)", re.MULTILINE),
        ("b)", "b."),
    ),
)

# name -> (pattern, number of matches at full strength)
_PATTERNS: dict[str, tuple[_Pattern, int]] = {
    "list_items": (_Pattern(re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])\s", re.MULTILINE), "-*•.)"), 5),
    "blank": (_Pattern(re.compile(r"__+|\.{4,}|…"), ("__", "....", "…")), 1),
    "latex": (_Pattern(re.compile(r"\\[a-zA-Z]+|\$[^$\n]{1,80}\$|\^\{?\d"), "\\$^"), 5),
    "symbols": (_Pattern(re.compile(r"[=<>≤≥+*/^∈∀∃→∧∨¬]"), "=<>≤≥+*/^∈∀∃→∧∨¬"), 6),
    "fractions": (_Pattern(re.compile(r"\d(?:\s?/\s?\d|\s?%|\.\d)"), "/%."), 4),
    "prices": (_Pattern(re.compile(r"[$€£]\s?\d"), "$€£"), 4),
    "syntax": (
        _Pattern(
            re.compile(
                r"```|\bdef \w+\(|\w\(\)|[{};][ \t]*$|=>|==|!=|</\w|#include|\bselect\b.{1,80}\bfrom\b",
                re.MULTILINE,
            ),
            (*"`{};=<#", "()", "def ", "select"),
        ),
        3,
    ),
    "exceptions": (
        _Pattern(
            re.compile(
                r"\b(?:is|are|was|were|would|does|do|has|have|can) not\b|"
                r"\b(?:except|least|false|true|incorrect)\b"
            ),
            (" not", "except", "least", "false", "true", "incorrect"),
        ),
        1,
    ),
    "statements": (
        _Pattern(
            re.compile(r"\b(?:statement \d|i,? (?:and|or) ii|ii|iii|only i)\b"),
            ("statement ", "ii", "only i"),
        ),
        2,
    ),
    "persona": (
        _Pattern(re.compile(r"\A\W*(?:act|pretend|imagine|picture yourself|assume the role|you are an? \w)")),
        1,
    ),
}

# The forms of a request, by how one of its first or last sentences begins.
_JUDGES = (
    "should|could|would|good|better|best|worth|useful|sensible|reasonable|important|recommend|suggest|advise|"
    "prefer|choose|think|sides?|benefits?|(?:dis)?advantages?|drawbacks?|pros|ways? to|affect(?:s|ed)?|"
    "changed?|differences?|differs?|roles?|reasons?|look like|happens?|going on"
)
_FORMS: dict[str, re.Pattern[str]] = {
    "asks_fact": re.compile(  # for a name, a place, a time or a number
        r"\W*(?:tell me |do you know |(?:in|on|at|by|for|to|from) )?"
        r"(?:who|whom|whose|when|where|which|what (?:year|day|colou?r|country|city|name)|"
        r"how (?:many|much|long|old|far|tall|high|big|large|deep)|name|state)\b"
        rf"(?![^.?!\n]{{0,60}}\b(?:{_JUDGES})\b)"
    ),
    "asks_openly": re.compile(  # for a text, a plan, an explanation or a judgement
        r"\W*(?:(?:is|are|does|do|should|would|could|can|what|which|who|where|when|how|in what|in which)\b"
        rf"[^.?!\n]{{0,60}}\b(?:{_JUDGES})\b|(?:should|would|could|why|how (?:do|does|did|can|could|should|"
        r"would|might|is|are|was|were)(?! (?:you|things|everything|it|life)\b))\b|"
        r"(?:(?:can|could|would|will) you |help me |i (?:need|want) you to |try to )?(?:"
        r"(?:tell me|i (?:want|would like|need) to know|know) (?:more |something )?about|"
        r"(?:give|share|list|name|tell me|show me|i need|i want|i would like) [^.?!\n]{0,20}\b(?:overview|"
        r"introduction|ideas?|tips|advice|feedback|examples|reasons|arguments|recipe|thoughts|story|"
        r"plan|email|letter|text|speech|essay|help)\b|make (?:an? |up |the )|"
        r"(?:compare|contrast|design|plan|outline|sketch|suggest|recommend|propose|brainstorm|argue|"
        r"defend|evaluate|assess|review|critici[sz]e|critique|analy[sz]e|discuss|debate|explain|"
        r"describe|teach|introduce|draft|create|develop|invent|come up|think of|prepare|"
        r"organi[sz]e|advise|persuade|convince)\b(?! (?:the following|this|these|it)\b)))"
    ),
}
_BEGINNINGS = 3  # sentences at either end whose beginning is read

NAMES: tuple[str, ...] = (
    "length",
    "long_words",
    "word_length",
    "sentence_length",
    "sentences",
    "variety",
    "numbers",
    "number_density",
    "quantities",
    "large_numbers",
    "variables",
    "questions",
    "lines",
    "quotes",
    "doubt",
    "options",
    "option_length",
    "numeric_options",
    "option_share",
    *_PATTERNS,
    *_FORMS,
    *lexicon.FEATURES,
)
_ABSENT = dict.fromkeys(NAMES, 0.0)


def options(text: str) -> list[str]:
    """Return the choices of a multiple-choice question, on lines of their own or in a row; else nothing."""
    for pattern in _OPTIONS:
        found: list[str] = []
        for match in pattern.matches(text):
            letter, choice = match.groups()
            if ord(letter.upper()) - ord("A") == len(found):
                found.append(choice)
        if len(found) >= 2:
            return found
    return []


def measure(text: str) -> dict[str, float]:
    """Return the strength of every feature, 0 to 1, in the order of `NAMES`.

    text   a prompt after `normal.question`
    """
    words = [word for word in words_of(text) if word not in lexicon.FILLERS]
    count = max(len(words), 1)
    lengths = [len(word) for word in words]
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    sentences = 1 + len(ends)
    last = text[max(ends[-1] if ends else 0, text.rfind("\n") + 1) :]
    asks = last[-1:] != "?" and last.split(None, 1)[0] in _ASKING if last.strip() else False
    # Beyond ASCII there are other digits.
    numbers = _NUMBER.findall(text) if not text.isascii() or _contains_any(text, "0123456789") else []
    counts = lexicon.counts(words, text)
    found = _ABSENT | _choice_features(text)
    found |= {
        "length": _between(math.log(count), math.log(5), math.log(500)),
        "long_words": _between(len([1 for length in lengths if length > 8]) / count, 0.0, 0.35),
        "word_length": _between(sum(lengths) / count, 3.0, 7.0),
        "sentence_length": _between(math.log(count / sentences), math.log(4), math.log(50)),
        "sentences": _between(math.log(sentences), 0, math.log(15)),
        "variety": len(set(words[:60])) / min(count, 60),
        "numbers": _between(math.log1p(len(numbers)), 0.0, math.log1p(15)),
        "number_density": _between(len(numbers) / (count + len(numbers)), 0.0, 0.3),
        "quantities": _between(math.log1p(len(numbers) + counts["number_words"]), 0.0, math.log(20)),
        "large_numbers": min(len([1 for number in numbers if len(number) > 3]), 4) / 4,
        "variables": min(len([1 for word in words if len(word) == 1 and word not in "aist"]), 6) / 6,
        "questions": min(text.count("?") + asks, 3) / 3,
        "lines": min(len(list(_STRUCTURE.finditer(text))), 12) / 12,
        "quotes": min(text.count('"'), 6) / 6,
        "doubt": _doubt(words[:_MOST]),
    }
    begins = {0, *ends[:_BEGINNINGS], *ends[-_BEGINNINGS:], text.rfind("\n") + 1}
    for name, form in _FORMS.items():
        found[name] = float(any(form.match(text, begin) for begin in begins))
    for name, (pattern, full) in _PATTERNS.items():
        found[name] = len(list(islice(pattern.matches(text), full))) / full
    for name, number in counts.items():
        found[name] = min(number / lexicon.FEATURES[name], 1.0)
    return found


def _choice_features(text: str) -> dict[str, float]:
    """Return the features of the choices of a question; nothing if it has none."""
    choices = options(text)
    if not choices:
        return {}
    length = sum(map(len, choices))
    return {
        "options": min(len(choices), 4) / 4,
        "option_length": _between(math.log1p(length / len(choices)), math.log(4), math.log(120)),
        "numeric_options": sum(any(map(str.isdigit, choice)) for choice in choices) / len(choices),
        "option_share": min(length / max(len(text), 1), 1.0),
    }


def _contains_any(text: str, literals: Sequence[str]) -> bool:
    return any(map(text.__contains__, literals))


def _doubt(words: Sequence[str]) -> float:
    """Return how doubtful it is that the language of *words* is known, 0 to 1."""
    long = [word for word in words if len(word) > 1 or not word.isascii()]
    if len(long) < _FEWEST:
        return 0.0
    # In English, words that are quick to look up are sufficient.
    if sum(map(lexicon.is_common, long)) >= _KNOWN * len(long):
        return 0.0
    known = sum(map(lexicon.known, long)) / len(long)
    return _between(_KNOWN - known, 0.0, _KNOWN - _FOREIGN)


def _between(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low)
    return 0.0 if share < 0.0 else min(share, 1.0)
