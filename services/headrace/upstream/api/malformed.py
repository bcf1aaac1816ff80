"""The exception for what violates OpenAI's API, within this folder."""

from __future__ import annotations

from typing import Any


class Malformed(Exception):
    """An upstream sent something that violates its API. The message completes "the service ... sent "."""


class Unusable(Malformed):
    """The service works, but the model's answer is not what the request asks for."""


def object_in(value: object, what: str) -> dict[str, Any]:
    """Return a JSON object. Raises Malformed.

    what   names the value, such as "a choice"
    """
    if isinstance(value, dict):
        return value
    raise Malformed(f"{what} that is not a JSON object")


def list_in(value: object, what: str) -> list[Any]:
    """Return a JSON list; an empty one for null. Raises Malformed."""
    if value is None:
        return []
    if isinstance(value, list):
        return value
    raise Malformed(f"{what} that are not a list")


def text_in(value: object, what: str) -> str:
    """Return a text; an empty one for null. Raises Malformed."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise Malformed(f"{what} that is not a text")
