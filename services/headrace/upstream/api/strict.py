"""Decide whether OpenAI's strict mode enforces a JSON schema.

Strict mode takes a subset: the root is an object, objects list all of their properties as required and allow
no others, and some keywords are missing. A schema outside of it is refused by the API, or only a hint. Limits
and keywords are those of the guide "Structured model outputs", section "Supported schemas".
"""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 10  # objects in each other
MAX_PROPERTIES = 5000
MAX_ENUM = 1000
MAX_CHARACTERS = 120_000  # of names of properties and definitions, and of values

# Keywords that contain schemas are read below.
_KEYWORDS = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const"),
        *("$ref", "$defs", "definitions", "description", "title", "$schema", "$id", "$comment"),
        *("pattern", "format", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"),
        *("minItems", "maxItems"),
    }
)
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})


def strict_schema(schema: dict[str, Any]) -> dict[str, Any] | None:
    """Return the schema for strict mode; None if strict mode does not enforce it.

    An object without additionalProperties gets false: fewer answers match, and all of them match *schema*.
    """
    if schema.get("type") != "object" or "anyOf" in schema or "$ref" in schema:
        return None
    reading = _Reading()
    try:
        changed = reading.read(schema, 0)
    except _Unfit:
        return None
    fits = (
        reading.properties <= MAX_PROPERTIES
        and reading.values <= MAX_ENUM
        and reading.characters <= MAX_CHARACTERS
    )
    return changed if fits else None


class _Unfit(Exception):
    """The schema is outside of the subset."""


class _Reading:
    """Counts what has a limit."""

    def __init__(self) -> None:
        self.properties = 0
        self.values = 0
        self.characters = 0

    def read(self, schema: object, depth: int) -> dict[str, Any]:
        """Return a copy for strict mode. Raises _Unfit."""
        if not isinstance(schema, dict) or not schema.keys() <= _KEYWORDS or depth > MAX_DEPTH:
            raise _Unfit
        if schema.get("format", "date") not in _FORMATS:
            raise _Unfit
        if not schema.keys() & {"type", "anyOf", "enum", "const", "$ref"}:
            raise _Unfit  # any value, which strict mode does not have
        changed = dict(schema)
        self._count_values(schema)
        for name in ("$defs", "definitions"):
            if name in schema:
                changed[name] = self._each(schema[name], depth)
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if "object" in kinds:
            changed |= self._object(schema, depth)
        elif schema.keys() & {"properties", "required", "additionalProperties"}:
            raise _Unfit
        if "items" in schema:
            changed["items"] = self.read(schema["items"], depth + 1)
        elif "array" in kinds:
            raise _Unfit
        if "anyOf" in schema:
            if not isinstance(schema["anyOf"], list):
                raise _Unfit
            changed["anyOf"] = [self.read(each, depth) for each in schema["anyOf"]]
        return changed

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        if "properties" not in schema and "additionalProperties" not in schema:
            raise _Unfit  # any object
        properties = self._each(schema.get("properties", {}), depth + 1)
        self.properties += len(properties)
        required = schema.get("required", [])
        if schema.get("additionalProperties", False) is not False or not isinstance(required, list):
            raise _Unfit
        if set(map(str, required)) != properties.keys():
            raise _Unfit
        return {"properties": properties, "required": required, "additionalProperties": False}

    def _each(self, schemas: object, depth: int) -> dict[str, Any]:
        if not isinstance(schemas, dict):
            raise _Unfit
        self.characters += sum(map(len, schemas))
        return {name: self.read(schema, depth) for name, schema in schemas.items()}

    def _count_values(self, schema: dict[str, Any]) -> None:
        values = schema.get("enum", [])
        if not isinstance(values, list):
            raise _Unfit
        self.values += len(values)
        for value in (*values, schema.get("const")):
            if isinstance(value, dict | list):
                raise _Unfit
            self.characters += len(value) if isinstance(value, str) else 0
