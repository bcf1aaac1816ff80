"""Read rows of JSON Lines from a file, or from standard input for `-`; a bad line is named by its number."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class BadRow(ValueError):
    """A line of the input cannot be used. The message names file and line, and says what it needs."""


def read_rows(path: str, texts: Sequence[str], *, numbers: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Each row of *path*, blank lines left out, as it is read.

    texts     fields that must be there, as strings; an "id" is added where it is absent: the line's number
    numbers   fields of which at least one must be there, as a number from 0 to 1; true and false are 1 and 0

    Raises BadRow.
    """
    name = "standard input" if path == "-" else path
    try:
        with nullcontext(sys.stdin) if path == "-" else Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix("\ufeff") if number == 1 else line  # what Windows puts before text
                if line.strip():
                    yield _row(line, number, f"{name}, line {number}", texts, numbers)
    except OSError as error:
        raise BadRow(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadRow(f"{name} is not UTF-8 text: {error.reason}") from error


def _row(line: str, number: int, where: str, texts: Sequence[str], numbers: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRow(f"{where}: a row is an object with the fields {', '.join([*texts, *numbers])}")
    row.setdefault("id", number)
    if not isinstance(row["id"], str | int | float):
        raise BadRow(f"{where}: field 'id' must be a string or a number")
    for name in texts:
        if not isinstance(row.get(name), str):
            raise BadRow(f"{where}: field {name!r} {'must be a string' if name in row else 'is missing'}")
    if numbers and not any(name in row for name in numbers):
        raise BadRow(f"{where}: one of the fields {', '.join(map(repr, numbers))} is needed")
    for name in numbers:
        value = row.get(name, 0)
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise BadRow(f"{where}: field {name!r} must be a number from 0 to 1, true or false")
    return row
