"""Read JSON Lines from a file, or from standard input for `-`. Errors name the line."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.routing.scoring.conversation import turns_of_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class BadRow(ValueError):
    """A line of the input is invalid. The message names the file, the line and the requirement."""


def read_rows(
    path: str, texts: Sequence[str], *, numbers: Sequence[str] = (), turns: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the rows of *path* without blank lines, while they are read.

    texts     required fields that are strings; if a row has no "id", the line number is added as its id
    turns     a row has "prompt", a string, or "messages", a list of objects with role and content; the field
              "turns" with the `Turn`s of either is added
    numbers   at least one of these fields is required, as a number from 0 to 1; true and false are 1 and 0

    Raises BadRow.
    """
    name = "standard input" if path == "-" else path
    try:
        with nullcontext(sys.stdin) if path == "-" else Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                # Windows writes a byte order mark.
                line = line.removeprefix("\ufeff") if number == 1 else line
                if line.strip():
                    yield _row(line, number, f"{name}, line {number}", texts, numbers, turns=turns)
    except OSError as error:
        raise BadRow(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadRow(f"{name} is not UTF-8 text: {error.reason}") from error


def _row(
    line: str, number: int, where: str, texts: Sequence[str], numbers: Sequence[str], *, turns: bool
) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        fields = ", ".join([*(["prompt or messages"] if turns else []), *texts, *numbers])
        raise BadRow(
            f"{where}: a row must be an object with the fields {fields}".removesuffix(" with the fields ")
        )
    row.setdefault("id", number)
    if not isinstance(row["id"], str | int | float):
        raise BadRow(f"{where}: field 'id' must be a string or a number")
    for name in texts:
        if not isinstance(row.get(name), str):
            raise BadRow(f"{where}: field {name!r} {'must be a string' if name in row else 'is missing'}")
    if turns:
        try:
            row["turns"] = turns_of_row(row)
        except ValueError as error:
            raise BadRow(f"{where}: {error}") from None
    if numbers and not any(name in row for name in numbers):
        raise BadRow(f"{where}: one of the fields {', '.join(map(repr, numbers))} is required")
    for name in numbers:
        value = row.get(name, 0)
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise BadRow(f"{where}: field {name!r} must be a number from 0 to 1, true or false")
    return row
