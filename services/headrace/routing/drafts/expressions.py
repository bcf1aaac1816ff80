"""Evaluate written arithmetic exactly and in bounded time: signs, powers, percentages, brackets.

Values are fractions, so that large integers and decimals are compared exactly. The only exception is
Uncertain: the value of the expression is not certain, or it needs numbers of more than a few hundred digits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

MAX_DIGITS = 40  # of one number; longer strings of digits are not part of a calculation
_GROUPED = re.compile(r"\d+(?:\.\d+)?|\.\d+|\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?")
_MAX_BITS = 2048  # of a numerator or denominator; powers beyond are computed in floating point
_LARGEST = 10**300


class Uncertain(ValueError):
    """The text is not arithmetic, or its value is not certain."""


def number(text: str) -> Fraction:
    """Return the value of a written number, such as "1,200.50" or "20%". Raises Uncertain."""
    digits = text.removesuffix("%").rstrip()
    if len(digits) > MAX_DIGITS or not _GROUPED.fullmatch(digits):
        raise Uncertain
    value = Fraction(digits.replace(",", ""))
    return value / 100 if text.endswith("%") else value


def evaluate(tokens: Sequence[str]) -> Fraction:
    """Return the value of an expression of numbers, `+ - * / ^ ( )`. Raises Uncertain.

    Powers bind tighter than signs and are right-associative: -2^2 is -4, 2^3^2 is 512. "100 - 20%" is 80.
    """
    try:
        reader = _Reader(tokens)
        value = reader.sum()
        if reader.head:
            raise Uncertain
    except (ZeroDivisionError, OverflowError, RecursionError):
        raise Uncertain from None
    if abs(value) > _LARGEST:
        raise Uncertain
    return value


class _Reader:
    """Parses tokens by recursive descent, with one method for each level of precedence."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._place = 0

    @property
    def head(self) -> str:
        """The next token; empty at the end."""
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def sum(self) -> Fraction:
        """Parse a sum of products."""
        terms = [self._term(1)]
        while self.head and self.head in "+-":
            terms.append(self._term(1 if self._take() == "+" else -1))
        shares = [share for _, share in terms]
        if any(shares) and not all(shares):
            # A percentage among numbers is a share of what precedes it. That is certain only at the end.
            if any(shares[:-1]):
                raise Uncertain
            base = _bounded(sum((value for value, _ in terms[:-1]), Fraction()))
            return _bounded(base + base * terms[-1][0])
        return _bounded(sum((value for value, _ in terms), Fraction()))

    def _term(self, sign: int) -> tuple[Fraction, bool]:
        """Parse a product; return it and whether it is a single percentage."""

        start = self._place
        value = sign * self._product()
        return value, self._place == start + 1 and self._tokens[start].endswith("%")

    def _product(self) -> Fraction:
        value = self._signed()
        while self.head and self.head in "*/(":
            sign = "*" if self.head == "(" else self._take()
            factor = self._signed()
            value = _bounded(value / factor if sign == "/" else value * factor)
        return value

    def _signed(self) -> Fraction:
        if self.head == "-":
            self._take()
            return -self._signed()
        return self._power()

    def _power(self) -> Fraction:
        base = self._atom()
        if self.head != "^":
            return base
        self._take()
        return _raised(base, self._signed())

    def _atom(self) -> Fraction:
        token = self._take()
        if token != "(":
            return number(token)
        value = self.sum()
        if self._take() != ")":
            raise Uncertain
        return value

    def _take(self) -> str:
        if not self.head:
            raise Uncertain
        self._place += 1
        return self._tokens[self._place - 1]


def _raised(base: Fraction, exponent: Fraction) -> Fraction:
    whole = exponent.denominator == 1
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if whole and bits * abs(exponent.numerator) <= _MAX_BITS:
        return Fraction(base**exponent.numerator)
    if base < 0 and not whole:
        raise Uncertain  # no real number
    value = float(base) ** (int(exponent) if whole else float(exponent))
    if not math.isfinite(value):
        raise Uncertain
    return Fraction(value)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise Uncertain
    return value
