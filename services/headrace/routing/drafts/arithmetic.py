"""Read the arithmetic in an answer: which equations are wrong, and which number is the final answer.

It reads prose, LaTeX and calculator marks such as `<<3*4=12>>`. It skips what is not certain, such as an
equation with a variable, or with a number in words ("half of 10 = 5"). Pure functions; `features.py` uses the
results.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice, pairwise

from headrace.routing.drafts.expressions import MAX_DIGITS, Uncertain, evaluate, number

_LATEX = (
    (re.compile(r"(?<!\d)(\d{1,9})\s?\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"(\1+(\2)/(\3))"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\^\s*\{([^{}]*)\}"), r"^(\1)"),
    (re.compile(r"\\times|\\cdot"), "*"),
    (re.compile(r"\\div"), "/"),
    (re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[%$]"), lambda match: match.group(0)[1:]),
    (re.compile(r"\\(?:left|right|approx|quad|[,;!\[\]()])"), " "),
)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
# `**` between two numbers, with the same space on either side, is a power; elsewhere it marks bold text.
_BOLD = re.compile(r"(?<![\d)])\*\*(?=[^\s*])([^*\n]*[^*\s])\*\*")
_STARS = re.compile(r"(?<=[\d)])( ?)\*\*\1(?=[-(]?[\d.(])")
_RAISED = re.compile(r"(?<=[\d)])[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_RAISED_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_UNIT = re.compile(r"(?<=[^\W\d_])\^\(?-?\d\)?")  # of cm^2, not a power of the number before it
_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))")
_MONEY = str.maketrans({"$": None, "€": None, "£": None, "−": "-"})
_BOUNDARY = re.compile(r"[\n;!?|]|:(?!\d)|\.(?=\s|$)|,(?=\s)")
_BULLET = re.compile(r"^\s*[+*]\s+")
_DASH = re.compile(r"^\s*[-–]\s")  # a bullet, or the sign of the first number
_MIXED = re.compile(r"(?<![\d.,/])(\d{1,9}) (\d{1,9}/\d{1,9})(?![\d/])")
# A time of day, a ratio, or groups of digits that may be one number or two: not certain to be a number.
_UNCLEAR = re.compile(r"\d:\d|\d \d{3}(?!\d)")
_TOKEN = re.compile(r"\d[\d,]*(?:\.\d+)?(?: ?%)?|\.\d+|[-+*/()\[\]^=×÷·⋅−–√]|[^\W\d_]+")
_NUMBER = re.compile(r"(?<![\w.])(?:-?\$?|\$-)\d[\d,]*(?:\.\d+)?")
_LEADING = re.compile(
    r"\s*+(?:about|approximately|roughly|~|≈)?\s*+([-–]?)\s*+(\d[\d,]*(?:\.\d+)?|\.\d+)(\s?%|\s?percent\b)?"
)
# What follows a number may be a part of it: 1.5e6, 2 million, 3 1/2, 2 remainder 3.
_CONTINUES = re.compile(
    r"e[-+]?\d|(?-i:[kM])\b|\s?(?:hundred|thousand|million|billion|trillion|dozen)\b|\s+\d+/\d|"
    r",?\s*(?:remainder|rem\b|r\s?\d)",
    re.IGNORECASE,
)
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
        *("log", "ln", "exp", "sin", "cos", "tan", "root", "floor", "ceil", "gcd", "lcm"),
        *("hundred", "thousand", "million", "billion"),
    ]
)
_SIGNS = {"×": "*", "÷": "/", "·": "*", "⋅": "*", "−": "-", "–": "-", "[": "(", "]": ")"}
_SPOKEN_SIGNS = {"x": "*", "X": "*", "times": "*", "plus": "+", "minus": "-"}
_MAX_TOKENS = 40  # of one side of an equation; longer ones are prose
_MAX_EQUATIONS = 256  # of one text


@dataclass(frozen=True, slots=True)
class Equation:
    """An equation in a text.

    left    value of the expression before the equals sign
    right   the value that the text gives
    holds   whether they agree to the precision of `right`
    """

    left: float
    right: float
    holds: bool


@dataclass(frozen=True, slots=True)
class _Written:
    """A number in a text: its value, its number of decimals, and whether it has a % sign."""

    value: Fraction
    decimals: int
    percent: bool = False


def plain(text: str) -> str:
    """Convert LaTeX of arithmetic to plain signs; drop calculator marks, currency signs and bold marks."""
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _BOLD.sub(r" \1 ", _CALCULATOR.sub("", text))
    text = _STARS.sub("^", text).replace("**", " ")
    text = _RAISED.sub(lambda found: f"^({found.group().translate(_RAISED_DIGITS)})", text)
    return _THOUSANDS.sub("", _UNIT.sub("", text)).translate(_MONEY)


def numbers(text: str) -> list[float]:
    """Return the numbers in *text*, in order."""
    found = (match.group() for match in _NUMBER.finditer(text))
    return [float(one.replace("$", "").replace(",", "")) for one in found if len(one) <= MAX_DIGITS]


def equations(text: str) -> list[Equation]:
    """Return every equation of numbers in *text* that can be evaluated, in order."""
    found: list[Equation] = []
    rounded: set[Fraction] = set()  # results that are not exact and may be used again
    sides = (_BULLET.sub("", stretch).split("=") for stretch in _BOUNDARY.split(plain(text)))
    for left, right in islice(chain.from_iterable(map(pairwise, sides)), _MAX_EQUATIONS):
        values, written = _readings(left), _leading_number(right)
        if not values or written is None:
            continue
        slack = values[0] / 10_000 if rounded and not rounded.isdisjoint(_operands(left)) else Fraction()
        percent = written.percent or "%" in left
        # In a chain such as "5 * 2 = 10 + 3 = 13", the right side may mean 10 or 13.
        meant = [written, *(_Written(value, 6) for value in _readings(right))]
        value = next(
            (v for v in values if any(_agree(v, one, abs(slack), percent=percent) for one in meant)), None
        )
        if value is not None and (slack or value != written.value):
            rounded.add(written.value)
        found.append(
            Equation(float(values[0] if value is None else value), float(written.value), value is not None)
        )
    return found


def _readings(side: str) -> list[Fraction]:
    """Return the possible values of the arithmetic at the end of *side*: a leading dash may be a sign."""
    dash = _DASH.match(side)
    readings = [_evaluated(side[dash.end() :]), _evaluated(side)] if dash else [_evaluated(side)]
    return [value for value in readings if value is not None]


def _operands(side: str) -> set[Fraction]:
    """Return the numbers in *side*."""
    found = set()
    for token in _TOKEN.findall(side):
        with suppress(Uncertain):
            found.add(number(token))
    return found


def _leading_number(side: str) -> _Written | None:
    """Return the number that *side* begins with; None if there is none or it is not certain."""
    match = _LEADING.match(side)
    if match is None or _UNCLEAR.match(side, match.end() - 1) or _CONTINUES.match(side, match.end()):
        return None
    sign, digits, percent = match.groups()
    try:
        value = number(digits)
    except Uncertain:
        return None
    return _Written(-value if sign else value, len(digits.partition(".")[2]), bool(percent))


def _agree(value: Fraction, written: _Written, slack: Fraction, *, percent: bool) -> bool:
    """Whether *written* is *value* to the precision of its decimals.

    slack     error that *value* may have because it was computed from rounded numbers
    percent   whether either side has a percentage, which may stand for its fraction
    """
    # Half a unit of the last digit if rounded, a whole unit if decimals are cut off.
    slack += Fraction(101, 100) / 10**written.decimals if written.decimals else Fraction(51, 100)
    candidates = (value, value * 100, value / 100) if percent else (value,)
    return any(abs(candidate - written.value) <= slack for candidate in candidates)


def _evaluated(side: str) -> Fraction | None:
    """Return the value of the arithmetic at the end of *side*; None if there is none or it is not certain."""
    tokens: list[str] = []
    words = _TOKEN.findall(_MIXED.sub(r"(\1+\2)", side))
    if len(words) > _MAX_TOKENS or _UNCLEAR.search(side):
        return None
    for place, token in enumerate(words):
        share = token == "of" and tokens and (tokens[-1].endswith("%") or "/" in tokens)
        if share:
            tokens.append("*")
        elif token in _SPOKEN_SIGNS and _between_numbers(words, place):
            tokens.append(_SPOKEN_SIGNS[token])
        elif token[0].isalpha():
            divided = token == "by" and words[place - 1] == "divided"
            if (len(token) == 1 and token.lower() not in "a") or token.lower() in _SPOKEN or divided:
                return None
        else:
            tokens.append(_SIGNS.get(token, token))
    if re.search(r"\d[a-zA-Z]\b", side) and not re.search(r"\d\s*[xX]\s*\d", side):
        return None
    tokens = _tail(tokens)
    if sum(token in "+-*/^" for token in tokens) == 0:
        return None
    try:
        return evaluate(tokens)
    except Uncertain:
        return None


def _between_numbers(words: Sequence[str], place: int) -> bool:
    before = place > 0 and (words[place - 1][0].isdigit() or words[place - 1] == ")")
    after = place + 1 < len(words) and (words[place + 1][0].isdigit() or words[place + 1] == "(")
    return before and after


def _tail(tokens: list[str]) -> list[str]:
    """Return the tokens after the last place where two numbers have no sign, but words, between them."""
    start = 0
    for place in range(1, len(tokens)):
        if tokens[place][0].isdigit() and (tokens[place - 1][0].isdigit()):
            start = place
    return tokens[start:]


_MARKED = re.compile(
    r"####\s*(?P<hash>[^\n]+)|\\boxed\s*\{(?P<boxed>[^{}]*)\}|"
    r"\b(?:final |correct )?(?:answer|result|solution)\s*(?:is|:|=|would be)\s*(?P<said>[^\n]{0,160})",
    re.IGNORECASE,
)


def final_answers(text: str) -> list[float]:
    """Return the numbers that the text marks as its answer (`#### 7`, `\\boxed{7}`, "the answer is 7")."""
    found = []
    for match in _MARKED.finditer(text):
        stretch = plain(next(group for group in match.groups() if group is not None))
        stretch = re.split(r"\.\s|\.$", stretch)[0]
        here = numbers(stretch)
        if here:
            # The answer of "the answer is 3 + 4 = 7" is the last number.

            found.append(here[-1] if "=" in stretch else here[0])
    return found
