"""Check the form that a request asks for its answer, as far as no grammar has to be compiled.

`validation` calls this on the event loop: sizes are checked before contents, and the JSON of a large schema
is left to the batcher, which compiles it off its event loop and finds what cannot be enforced.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from headrace import errors
from headrace.checks.conversations import READ_AT_ONCE
from headrace.v1 import generation_pb2 as pb

MAX_SCHEMA_BYTES = 64 * 1024
MAX_REGEX_BYTES = 16 * 1024
MAX_LARK_BYTES = 64 * 1024
MAX_CHOICES = 1024
MAX_CHOICE_BYTES = 1024


def check_structured(sampling: pb.Sampling) -> None:
    """Raise InvalidSampling for a form that is too large or malformed. *sampling* has one."""
    kind = sampling.WhichOneof("structured")
    if sampling.ignore_eos:
        raise _invalid(kind, "is set together with ignore_eos, but the form decides where the answer ends")
    match kind:
        case "json_schema":
            _check_text(kind, sampling.json_schema, MAX_SCHEMA_BYTES)
            if len(sampling.json_schema) <= READ_AT_ONCE:
                read_schema(sampling.json_schema)
        case "json_object":
            if not sampling.json_object:
                raise _invalid(kind, "is false, must be true: leave it out for other answers")
        case "regex":
            _check_text(kind, sampling.regex, MAX_REGEX_BYTES)
        case "lark":
            _check_text(kind, sampling.lark, MAX_LARK_BYTES)
        case "choices":
            _check_choices(sampling.choices)


def read_schema(text: str) -> dict[str, Any]:
    """Return the JSON schema of `Sampling.json_schema`. Raises InvalidSampling if it is not a JSON object."""
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise _invalid("json_schema", "has too many lists and objects in each other") from None
    except json.JSONDecodeError as error:
        raise _invalid("json_schema", f"is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # a number that JSON does not have, or with thousands of digits
        raise _invalid("json_schema", f"is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise _invalid("json_schema", 'is JSON, but not an object such as {"type": "object"}')
    return schema


def _check_text(kind: str, text: str, most: int) -> None:
    if not text:
        raise _invalid(kind, "is empty")
    if (size := _bytes(text, most)) > most:
        raise _invalid(kind, f"has {size} bytes, must be at most {most}")


def _check_choices(choices: pb.Choices) -> None:
    count = len(choices.texts)
    if not 1 <= count <= MAX_CHOICES:
        raise _invalid("choices", f"has {count} texts, must be 1 to {MAX_CHOICES}")
    seen: set[str] = set()
    for place, text in enumerate(choices.texts):
        if not 1 <= (size := _bytes(text, MAX_CHOICE_BYTES)) <= MAX_CHOICE_BYTES:
            raise _invalid("choices", f"has text {place} of {size} bytes, must be 1 to {MAX_CHOICE_BYTES}")
        if text in seen:
            raise _invalid("choices", f"has text {place} twice: leave one out")
        seen.add(text)


def _bytes(text: str, most: int) -> int:
    """Return the size of *text*; at least its characters if they are more than *most*."""
    return len(text) if text.isascii() or len(text) > most else len(text.encode())


def _invalid(kind: str | None, complaint: str) -> errors.InvalidSampling:
    return errors.InvalidSampling(f"sampling.{kind} {complaint}", field=f"sampling.{kind}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which is not a JSON number")
