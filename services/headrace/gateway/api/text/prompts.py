"""Read the `prompt` of a text completion: one or several, as text or as token ids."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import PlainValidator

from headrace.quoting import quoted

MAX_PROMPTS = 128  # of a request; each is a request of its own in the mesh

_MAX_ID = 2**32 - 1
_WANTED = "must be a text, a list of texts, a list of token ids, or a list of such lists"

Prompt: TypeAlias = str | list[int]


def prompts_of(value: Any) -> list[Prompt]:
    """Return the prompts in the JSON value of `prompt`. Raises ValueError."""
    if isinstance(value, str):
        return [_text(value, "")]
    if not isinstance(value, list):
        raise ValueError(f"is {_kind(value)}, {_WANTED}")
    if not value:
        raise ValueError("is an empty list: give at least one prompt")
    if isinstance(value[0], int):
        return [_ids(value, "")]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"has {len(value)} prompts, must have at most {MAX_PROMPTS}: send several requests")
    first = type(value[0])
    if first not in (str, list):
        raise ValueError(f"[0] is {_kind(value[0])}, {_WANTED}")
    for place, item in enumerate(value):
        if type(item) is not first:
            raise ValueError(
                f"[{place}] is {_kind(item)}, but [0] is {_kind(value[0])}: send them separately"
            )
    read = _text if first is str else _ids
    return [read(item, f"[{place}] ") for place, item in enumerate(value)]


Prompts = Annotated[list[Prompt], PlainValidator(prompts_of)]


def _text(value: str, place: str) -> str:
    if not value:
        raise ValueError(f"{place}is empty: it must have at least one character")
    return value


def _ids(value: list[Any], place: str) -> list[int]:
    if not value:
        raise ValueError(f"{place}has no token ids: it must have at least one")
    for at, id in enumerate(value):
        if type(id) is not int:  # also not a bool
            raise ValueError(f"{place}has {_kind(id)} at {at}, where a token id was expected")
        if not 0 <= id <= _MAX_ID:
            raise ValueError(f"{place}has {quoted(str(id)).strip(chr(39))} at {at}, which is no token id")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds: dict[type[object], str] = {str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
