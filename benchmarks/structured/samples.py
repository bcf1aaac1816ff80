"""Make values that match the schemas of `generator`, which has no other keywords than those here."""

from __future__ import annotations

import random
from typing import Any

from headrace.grammars.walking import resolved

_WORDS = ("alpha", "beta gamma", "Zürich", "it's", 'say "hi"', "line\nbreak", "日本", "x", "a/b", "tab\there")
_MORE = 0.5  # of optional properties
_DEEP = 4  # references inside of each other; then what is optional is left out


def sample(schema: dict[str, Any], rng: random.Random) -> Any:
    """Return a value that matches *schema*, with properties in its order."""
    return _sample(schema, rng, schema, 0)


def _sample(schema: Any, rng: random.Random, root: dict[str, Any], depth: int) -> Any:
    if not isinstance(schema, dict):
        return rng.choice([1, "any", None])
    if "examples" in schema:
        return rng.choice(schema["examples"])
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "$ref" in schema:
        target = resolved(root, schema["$ref"])
        assert target is not None
        return _sample(target[1], rng, root, depth + 1)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            options = [each for each in schema[key] if depth < _DEEP or "$ref" not in each]
            return _sample(rng.choice(options), rng, root, depth)
    kind = schema.get("type")
    match rng.choice(kind) if isinstance(kind, list) else kind:
        case "object":
            return _object(schema, rng, root, depth)
        case "array":
            return _array(schema, rng, root, depth)
        case "integer":
            return _integer(schema, rng)
        case "number":
            return _number(schema, rng)
        case "boolean":
            return rng.random() < 0.5
        case "null":
            return None
        case _:
            return rng.choice(_WORDS)


def _object(schema: dict[str, Any], rng: random.Random, root: dict[str, Any], depth: int) -> dict[str, Any]:
    required, value = schema.get("required", []), {}
    for name, each in schema.get("properties", {}).items():
        if name in required or (rng.random() < _MORE and depth < _DEEP):
            value[name] = _sample(each, rng, root, depth)
    more = schema.get("additionalProperties", True)
    if "patternProperties" in schema:
        more = next(iter(schema["patternProperties"].values()))
    if more and rng.random() < _MORE:
        for name in rng.sample(["extra", "other"], rng.randint(1, 2)):
            value[name] = _sample(more, rng, root, depth)
    return value


def _array(schema: dict[str, Any], rng: random.Random, root: dict[str, Any], depth: int) -> list[Any]:
    least, most = schema.get("minItems", 0), schema.get("maxItems", 3)
    if depth >= _DEEP:
        most = least
    head = schema.get("prefixItems", [])
    items = schema.get("items", True)
    if items is False:
        most = min(most, len(head))
    count = rng.randint(least, max(least, most))
    return [_sample(head[at] if at < len(head) else items, rng, root, depth) for at in range(count)]


def _bounds(schema: dict[str, Any], gap: float) -> tuple[float, float]:
    low = schema.get("minimum", schema.get("exclusiveMinimum", schema.get("maximum", 900) - 900) + gap)
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 1000) - gap)
    return low, high


def _integer(schema: dict[str, Any], rng: random.Random) -> int:
    low, high = _bounds(schema, 1)
    step = schema.get("multipleOf", 1)
    return int(rng.randint(-(-int(low) // step), int(high) // step) * step)


def _number(schema: dict[str, Any], rng: random.Random) -> float:
    if (step := schema.get("multipleOf")) is not None:
        low, high = _bounds(schema, step)
        return rng.randint(-int(-low // 1), int(high // 1))  # whole numbers, which have one spelling
    low, high = _bounds(schema, 0.125)
    return min(max(round(rng.uniform(low, high), 2), low), high)
