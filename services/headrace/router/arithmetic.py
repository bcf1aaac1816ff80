"""Read the arithmetic in an answer: which written equations do not add up, and what the answer ends with.

Works on prose, LaTeX and calculator marks such as `<<3*4=12>>`. It reads only what it is sure of: an
equation with a variable, or with a number in words ("half of 10 = 5"), is passed over. Pure functions; what
follows from the findings is `draft_check.py`'s to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"(\1)/(\2)"),
    (re.compile(r"\\times|\\cdot"), "*"),
    (re.compile(r"\\div"), "/"),
    (re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[%$]"), lambda match: match.group(0)[1:]),
    (re.compile(r"\\(?:left|right|approx|quad|[,;!\[\]()])"), " "),
)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_BOUNDARY = re.compile(r"[\n;!?]|:(?!\d)|\.(?=\s|$)|,(?=\s)")
_BULLET = re.compile(r"^\s*[-+*–]\s+")
_CLOCK = re.compile(r"\d:\d")  # a time of day, or a ratio: not a number
_TOKEN = re.compile(r"\d[\d,]*(?:\.\d+)?%?|\.\d+|[-+*/()=×÷−–^]|[^\W\d_]+")
_NUMBER = re.compile(r"(?<![\w.])-?\$?-?\d[\d,]*(?:\.\d+)?")
_SPOKEN = frozenset(
    [
        "half",
        "twice",
        "double",
        "triple",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "dozen",
        "percent",
        "sqrt",
        "squared",
        "cubed",
        "sum",
        "product",
        "remainder",
        "cents",
        "cent",
        "mod",
        "fifth",
        "sixth",
        "eighth",
        "tenth",
        "thrice",
    ]
)
_SIGNS = {"×": "*", "÷": "/", "−": "-", "–": "-", "x": "*", "X": "*"}
_MAX_TOKENS = 40  # of one side of an equation; longer ones are prose


@dataclass(frozen=True, slots=True)
class Equation:
    """An equation as written, `left` evaluated.

    left    what the expression before the equals sign comes to
    right   what the text says that it comes to
    holds   whether they agree, as far as the digits of `right` go
    """

    left: float
    right: float
    holds: bool


def plain(text: str) -> str:
    """Turn the LaTeX of arithmetic into signs, and drop calculator marks and money and bold signs."""
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return _CALCULATOR.sub("", text).replace("$", "").replace("**", " ").replace("€", "").replace("£", "")


def numbers(text: str) -> list[float]:
    """The numbers in *text*, in order."""
    return [float(match.group().replace("$", "").replace(",", "")) for match in _NUMBER.finditer(text)]


def equations(text: str) -> list[Equation]:
    """Every equation of numbers in *text* that can be evaluated, in order."""
    found = []
    for stretch in _BOUNDARY.split(plain(text)):
        for left, right in pairwise(_BULLET.sub("", stretch).split("=")):
            value, written = _evaluate(left), _leading_number(right)
            if value is not None and written is not None:
                # "5 * 2 = 10 + 3 = 13" runs on: either the 10 or the 13 may be meant.
                onward = _evaluate(right)
                holds = _agree(value, *written) or (onward is not None and _agree(value, onward, 6))
                found.append(Equation(value, written[0], holds))
    return found


def _leading_number(side: str) -> tuple[float, int] | None:
    """The number that *side* begins with, and how many decimals it shows."""
    match = re.match(r"\s*+(?:about|approximately|roughly|~|≈)?\s*+(-?\s*+\d[\d,]*(?:\.\d+)?|-?\.\d+)", side)
    if match is None or _CLOCK.match(side, match.end() - 1):
        return None
    digits = match.group(1).replace(",", "").replace(" ", "")
    return float(digits), len(digits.partition(".")[2])


def _agree(value: float, written: float, decimals: int) -> bool:
    """Whether *written* is *value* as far as its decimals go; a percentage may stand for its fraction."""
    # Half a unit of the last digit when rounded, a whole one when decimals are cut off.
    slack = (1.01 * 10.0**-decimals if decimals else 0.51) + 1e-4 * abs(value)
    return any(abs(candidate - written) <= slack for candidate in (value, value * 100, value / 100))


def _evaluate(side: str) -> float | None:
    """The value of the arithmetic that *side* ends with; None if there is none that is certain."""
    tokens: list[str] = []
    words = _TOKEN.findall(side)
    if len(words) > _MAX_TOKENS or _CLOCK.search(side):
        return None
    for place, token in enumerate(words):
        share = token == "of" and tokens and (tokens[-1].endswith("%") or "/" in tokens)
        if share or (token in "xX" and _between_numbers(words, place)):
            tokens.append("*")
        elif token[0].isalpha():
            if (len(token) == 1 and token.lower() not in "a") or token.lower() in _SPOKEN:
                return None
        else:
            tokens.append(_SIGNS.get(token, token))
    if re.search(r"\d[a-zA-Z]\b", side) and not re.search(r"\d\s*[xX]\s*\d", side):
        return None
    tokens = _tail(tokens)
    if sum(token in "+-*/^" for token in tokens) == 0:
        return None
    try:
        value, rest = _sum(tokens)
    except (ValueError, ZeroDivisionError, OverflowError, IndexError, RecursionError):
        return None
    return value if not rest and abs(value) < 1e15 else None


def _between_numbers(words: Sequence[str], place: int) -> bool:
    before = place > 0 and (words[place - 1][0].isdigit() or words[place - 1] == ")")
    after = place + 1 < len(words) and (words[place + 1][0].isdigit() or words[place + 1] == "(")
    return before and after


def _tail(tokens: list[str]) -> list[str]:
    """What follows the last two numbers without a sign between them: words stood there."""
    start = 0
    for place in range(1, len(tokens)):
        if tokens[place][0].isdigit() and (tokens[place - 1][0].isdigit()):
            start = place
    return tokens[start:]


def _sum(tokens: list[str]) -> tuple[float, list[str]]:
    value, rest = _product(tokens)
    while rest and rest[0] in "+-":
        sign, (term, after) = rest[0], _product(rest[1:])
        # "100 - 20%" takes a fifth of the hundred.
        if rest[1].endswith("%") and len(after) == len(rest) - 2:
            term *= value
        value, rest = (value + term if sign == "+" else value - term), after
    return value, rest


def _product(tokens: list[str]) -> tuple[float, list[str]]:
    value, rest = _power(tokens)
    while rest and rest[0] in "*/(":
        sign = rest[0]
        factor, rest = _power(rest if sign == "(" else rest[1:])
        value = value / factor if sign == "/" else value * factor
    return value, rest


def _power(tokens: list[str]) -> tuple[float, list[str]]:
    value, rest = _atom(tokens)
    if rest and rest[0] == "^":
        exponent, rest = _atom(rest[1:])
        value = float(abs(value) ** min(exponent, 64.0))
    return value, rest


def _atom(tokens: list[str]) -> tuple[float, list[str]]:
    head = tokens[0]
    if head == "-":
        value, rest = _atom(tokens[1:])
        return -value, rest
    if head == "(":
        value, rest = _sum(tokens[1:])
        if rest[0] != ")":
            raise ValueError
        return value, rest[1:]
    if head.endswith("%"):
        return float(head[:-1].replace(",", "")) / 100, tokens[1:]
    return float(head.replace(",", "")), tokens[1:]


_MARKED = re.compile(
    r"####\s*(?P<hash>[^\n]+)|\\boxed\s*\{(?P<boxed>[^{}]*)\}|"
    r"\b(?:final |correct )?(?:answer|result|solution)\s*(?:is|:|=|would be)\s*(?P<said>[^\n]{0,160})",
    re.IGNORECASE,
)


def final_answers(text: str) -> list[float]:
    """The numbers that the text itself marks as its answer (`#### 7`, `\\boxed{7}`, "the answer is 7")."""
    found = []
    for match in _MARKED.finditer(text):
        stretch = plain(next(group for group in match.groups() if group is not None))
        stretch = re.split(r"\.\s|\.$", stretch)[0]
        here = numbers(stretch)
        if here:
            # "the answer is 3 + 4 = 7" ends with what it says.
            found.append(here[-1] if "=" in stretch else here[0])
    return found
