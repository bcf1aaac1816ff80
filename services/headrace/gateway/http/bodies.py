"""Parse the body of a request as JSON, within limits of time and depth."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from headrace.gateway.problems import Problem

# Python parses 50 to 100 bytes of JSON per microsecond, and 10 in the worst case, short numbers. A longer body is
# parsed on a thread: the interpreter's lock is shared, but it changes hands every 5 ms.
ON_LOOP_BYTES = 64 * 1024
MAX_DEPTH = 64  # of nested objects and arrays


async def json_of(body: bytes) -> dict[str, Any]:
    """Return a body that is a JSON object in UTF-8. Raises Problem (400)."""
    if len(body) <= ON_LOOP_BYTES:
        return parse(body)
    return await asyncio.to_thread(parse, body)


def parse(body: bytes) -> dict[str, Any]:
    """Return a body that is a JSON object in UTF-8. Raises Problem (400)."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _invalid(
            f"the body is not valid UTF-8: byte 0x{body[error.start]:02x} at {error.start}"
        ) from None
    if not text.strip():
        raise _invalid("the body is empty; it must be a JSON object")
    if _too_deep(text):
        raise _invalid(f"the body has more than {MAX_DEPTH} nested objects and arrays")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        raise _invalid(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if _SURROGATE.search(text) and not _encodes(value):
        raise _invalid("a string has half of a surrogate pair, such as \\ud83d without its second half")
    if not isinstance(value, dict):
        raise _invalid(f"the body must be a JSON object, but is {_KINDS.get(type(value), 'something else')}")
    return value


def _invalid(message: str) -> Problem:
    return Problem(400, message, code="invalid_json")


_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BRACKETS = re.compile(r"[\[\]{}]")
_MAX_DIGITS = 400


def _too_deep(text: str) -> bool:
    """Return whether a text nests deeper than MAX_DEPTH outside of strings. It need not be valid JSON."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in _BRACKETS.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _encodes(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> float:
    raise _invalid(f"{name} is not a number of JSON")


def _parse_int(digits: str) -> int:
    # Python refuses more than 4,300 digits with a ValueError of its own, and takes long for a few less.
    if len(digits) > _MAX_DIGITS:
        raise _invalid(f"a number has more than {_MAX_DIGITS} digits")
    return int(digits)
