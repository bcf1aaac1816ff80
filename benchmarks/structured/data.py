"""Read the schemas of the benchmark, and judge answers independently of what made them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import jsonschema
import referencing
import referencing.exceptions

FILE = Path(__file__).with_name("schemas.jsonl")


@dataclass(frozen=True)
class Entry:
    """A schema, and values that match it, all as JSON."""

    name: str
    group: str
    schema: str
    values: list[str]


def entries(limit: int | None = None) -> list[Entry]:
    """Return the schemas of the benchmark: all, or about *limit* of them, spread over all."""
    every = [Entry(**json.loads(line)) for line in FILE.read_text().splitlines()]
    return every[:: max(1, len(every) // (limit or len(every)))]


def fault(schema: str, answer: str) -> str:
    """Return why *answer* is not a value of *schema*, by the package `jsonschema`; empty if it is one.

    Numbers are decimal, because 0.3 is a multiple of 0.1 in JSON, but not as binary fractions.
    """
    read: Any = json.loads(schema, parse_float=_decimal)
    try:
        value = json.loads(answer, parse_float=_decimal)
    except ValueError as error:
        return f"no JSON: {error}"
    kind = jsonschema.validators.validator_for(read, jsonschema.Draft202012Validator)
    judge = kind(read, format_checker=kind.FORMAT_CHECKER, registry=referencing.Registry())  # fetches nothing
    try:
        problem = next(judge.iter_errors(value), None)
    except referencing.exceptions.Unresolvable as error:
        return f"no such reference: {error}"
    return problem.message[:200] if problem is not None else ""


def _decimal(text: str) -> Decimal | float:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent that no decimal number has
        return float(text)
