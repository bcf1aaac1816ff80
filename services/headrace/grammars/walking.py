"""Walk through JSON schemas: which keywords contain others, and where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

Schema: TypeAlias = dict[str, Any]

# Keywords whose value is a schema, a list of schemas, or schemas by name. Some have two forms.
_ONE = frozenset(
    (
        *("additionalProperties", "items", "additionalItems", "contains", "not", "if", "then", "else"),
        *("propertyNames", "unevaluatedItems", "unevaluatedProperties"),
    )
)
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))


class Place(NamedTuple):
    """Where something is in a document; `str` returns the JSON pointer.

    Pointers are written on demand only: those of all values of a small schema may have GiB, because each
    repeats the names around it.

    outer   None: of the document itself
    below   the pointer from there
    """

    outer: Place | None = None
    below: str = ""

    def __str__(self) -> str:
        parts, place = [self.below], self.outer
        while place is not None:
            parts.append(place.below)
            place = place.outer
        return "".join(reversed(parts))


def pointer(*keys: str | int) -> str:
    """Return the JSON pointer of the *keys* that lead to a place."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def children(schema: Schema) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly in a schema, each with its JSON pointer from there."""
    for key, value in schema.items():
        if key in _ONE and isinstance(value, dict):
            yield pointer(key), value
        elif key in _LISTS and isinstance(value, list):
            yield from ((pointer(key, place), each) for place, each in enumerate(value))
        elif key in _MAPS and isinstance(value, dict):
            yield from ((pointer(key, name), each) for name, each in value.items())


def subschemas(schema: Schema) -> Iterator[tuple[Place, Schema]]:
    """Yield a schema and all that are in it, outer ones first, each with its place."""
    waiting: list[tuple[Place, Any]] = [(Place(), schema)]
    while waiting:
        at, each = waiting.pop()
        if isinstance(each, dict):
            yield at, each
            waiting += ((Place(at, below), child) for below, child in reversed(list(children(each))))


def resolved(root: Schema, reference: Any) -> tuple[str, Any] | None:
    """Return the pointer and the schema that a `$ref` such as "#/$defs/name" names; None for others."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    found: Any = root
    for key in reference[2:].split("/") if reference != "#" else ():
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key[:6]) < len(found):
            found = found[int(key[:6])]
        else:
            return None
    return reference[1:], found


def depth_exceeded(value: Any, most: int) -> Place | None:
    """Return the place of a value inside of more than *most* lists and objects; None if there is none."""
    waiting: list[tuple[Place, int, Any]] = [(Place(), 1, value)]
    while waiting:
        place, depth, each = waiting.pop()
        if isinstance(each, dict | list):
            if depth > most:
                return place
            items = each.items() if isinstance(each, dict) else enumerate(each)
            waiting += (
                (Place(place, pointer(key)), depth + 1, inner)
                for key, inner in items
                if isinstance(inner, dict | list)
            )
    return None
