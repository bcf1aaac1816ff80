"""Read JSON schemas within bounds, and set how the JSON values of an answer are written."""

from __future__ import annotations

import json
from typing import Any

MAX_SCHEMA_BYTES = 64 << 10

# How values are written. A key of this name in a caller's schema would be able to switch checks off.
_OPTIONS = "x-guidance"
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

ANY_OBJECT: dict[str, Any] = {_OPTIONS: _WRITTEN, "type": "object"}


class FormProblem(Exception):
    """A form that callers ask for is malformed, too large, or cannot be enforced.

    message   what to change, for people
    place     where in the form, as a JSON pointer; empty: as a whole
    """

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.place = place


def read_schema(text: str) -> dict[str, Any]:
    """Return a schema with the options for llguidance. Raises FormProblem."""
    if len(text) > MAX_SCHEMA_BYTES:
        raise FormProblem(f"the schema has more than {MAX_SCHEMA_BYTES} bytes")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormProblem(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise FormProblem("the schema is not a JSON object")
    return {_OPTIONS: _WRITTEN, **{key: value for key, value in schema.items() if key != _OPTIONS}}
