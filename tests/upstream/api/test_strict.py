"""OpenAI's strict mode is used for schemas that it enforces, and for no others."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.upstream.api.strict import strict_schema


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = closed(inner=schema)
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        closed(),
        closed(a={"type": "string", "pattern": "^a", "format": "date"}, b={"type": ["integer", "null"]}),
        closed(a={"enum": ["x", 1, None]}, b={"const": "y"}, c={"type": "boolean", "description": "yes"}),
        closed(a={"type": "array", "items": closed(b={"type": "number", "minimum": 0}), "maxItems": 3}),
        closed(a={"anyOf": [{"type": "string"}, closed(b={"type": "null"})]}),
        {**closed(a={"$ref": "#/$defs/t"}), "$defs": {"t": {"type": "string"}}},
        nested(10),
    ],
)
def test_a_schema_of_the_subset_is_unchanged(schema: dict[str, Any]) -> None:
    assert strict_schema(schema) == schema


def test_objects_are_closed_everywhere() -> None:
    inner = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}
    schema = {"type": "object", "properties": {"a": inner}, "required": ["a"]}

    assert strict_schema(schema) == closed(a=closed(b={"type": "string"}))
    assert "additionalProperties" not in schema


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "string"},
        {"type": "object"},  # any object
        {"anyOf": [closed()]},
        {"$ref": "#/$defs/a", "$defs": {"a": closed()}},
        {**closed(a={"type": "string"}), "required": []},  # an optional property
        {**closed(a={"type": "string"}), "required": "a"},
        {**closed(), "additionalProperties": {"type": "string"}},
        {**closed(), "patternProperties": {}},
        {**closed(), "properties": []},
        closed(a={}),
        closed(a=True),
        closed(a={"type": "string", "format": "uri"}),
        closed(a={"type": "string", "minLength": 1}),
        closed(a={"type": "array"}),
        closed(a={"type": "array", "items": [{"type": "string"}]}),
        closed(a={"type": ["object", "null"]}),
        closed(a={"anyOf": {"type": "string"}}),
        closed(a={"oneOf": [{"type": "string"}]}),
        closed(a={"enum": "x"}),
        closed(a={"enum": [{"b": 1}]}),
        closed(a={"enum": list(range(1001))}),
        closed(a={"const": "x" * 120_001}),
        closed(**{f"p{number}": {"type": "string"} for number in range(5001)}),
        nested(12),
    ],
)
def test_another_schema_is_not_enforced(schema: dict[str, Any]) -> None:
    assert strict_schema(schema) is None
