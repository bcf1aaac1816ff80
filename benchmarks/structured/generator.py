"""Make the schemas of the benchmark, with values that match them.

`python -m benchmarks.structured generate` writes them to a file. They are made like those that applications
send: from the fields of their records, with the keywords of hand-written schemas and of those that Pydantic
and OpenAPI write. The last group has what is unusual, and what cannot be enforced. The same seed makes the
same file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.structured.samples import sample

Schema = dict[str, Any]

SEED = 16
SAMPLES = 3  # values of each schema

_RECORDS: dict[str, list[tuple[str, str]]] = {
    "person": [
        ("name", "text"), ("age", "age"), ("email", "email"), ("city", "text"), ("active", "flag"),
        ("height_m", "size"), ("nickname", "maybe"), ("role", "role"), ("languages", "texts"),
    ],
    "order": [
        ("order_id", "code"), ("customer", "text"), ("total", "price"), ("currency", "currency"),
        ("quantity", "count"), ("placed_on", "date"), ("express", "flag"), ("note", "maybe"),
        ("tags", "texts"),
    ],
    "event": [
        ("title", "text"), ("starts_at", "moment"), ("minutes", "count"), ("place", "text"),
        ("capacity", "count"), ("online", "flag"), ("level", "level"), ("speakers", "texts"), ("url", "uri"),
    ],
    "product": [
        ("sku", "code"), ("title", "text"), ("price", "price"), ("stock", "count"), ("rating", "rating"),
        ("color", "color"), ("available", "flag"), ("description", "maybe"), ("sizes", "counts"),
    ],
    "ticket": [
        ("id", "uuid"), ("summary", "text"), ("priority", "level"), ("status", "status"),
        ("assignee", "maybe"), ("opened", "moment"), ("votes", "count"), ("labels", "texts"),
        ("resolved", "flag"),
    ],
    "recipe": [
        ("dish", "text"), ("serves", "count"), ("minutes", "count"), ("vegetarian", "flag"),
        ("steps", "texts"), ("difficulty", "level"), ("calories", "size"), ("cuisine", "text"),
        ("author", "maybe"),
    ],
    "sensor": [
        ("device", "code"), ("celsius", "temperature"), ("humidity", "share"), ("online", "flag"),
        ("readings", "sizes"), ("address", "ipv4"), ("seen", "moment"), ("battery", "share"),
        ("site", "text"),
    ],
    "song": [
        ("title", "text"), ("artist", "text"), ("seconds", "count"), ("genre", "genre"), ("explicit", "flag"),
        ("released", "date"), ("plays", "count"), ("rating", "rating"), ("writers", "texts"),
    ],
}  # fmt: skip

_ENUMS = {
    "role": ["admin", "editor", "viewer"],
    "currency": ["EUR", "USD", "GBP", "JPY"],
    "level": ["low", "medium", "high"],
    "status": ["open", "in progress", "done", "won't fix"],
    "color": ["red", "green", "blue", "schwarz-weiß"],
    "genre": ["rock", "jazz", "classical", "R&B", "日本語"],
}

_LEAVES: dict[str, Schema] = {
    "text": {"type": "string"},
    "maybe": {"type": ["string", "null"]},
    "flag": {"type": "boolean"},
    "count": {"type": "integer", "minimum": 0},
    "age": {"type": "integer", "minimum": 0, "maximum": 130},
    "size": {"type": "number"},
    "price": {"type": "number", "minimum": 0},
    "rating": {"type": "number", "minimum": 0, "maximum": 5},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
    "temperature": {"type": "number", "minimum": -50, "maximum": 60},
    "email": {"type": "string", "format": "email", "examples": ["ada@example.org", "b.c@mail.example.com"]},
    "uri": {"type": "string", "format": "uri", "examples": ["https://example.org/a?b=1", "mailto:x@y.org"]},
    "uuid": {"type": "string", "format": "uuid", "examples": ["6f1c1b1e-8f0a-4c53-9d3e-0a1b2c3d4e5f"]},
    "date": {"type": "string", "format": "date", "examples": ["2024-02-29", "1999-12-31"]},
    "moment": {"type": "string", "format": "date-time", "examples": ["2024-05-01T09:30:00Z"]},
    "ipv4": {"type": "string", "format": "ipv4", "examples": ["192.168.0.1", "8.8.8.8"]},
    "code": {"type": "string", "pattern": "^[A-Z]{2,4}-[0-9]{3,6}$", "examples": ["AB-123", "WXYZ-000042"]},
    "texts": {"type": "array", "items": {"type": "string"}},
    "counts": {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
    "sizes": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4},
    **{name: {"type": "string", "enum": values} for name, values in _ENUMS.items()},
}

_FORMATS: dict[str, list[str]] = {
    "date-time": ["2024-05-01T09:30:00Z", "2000-02-29T23:59:59.125+02:00"],
    "time": ["09:30:00Z", "23:59:59+01:00"],
    "date": ["2024-02-29", "1970-01-01"],
    "duration": ["P3DT4H", "PT15M"],
    "email": ["ada@example.org"],
    "hostname": ["www.example.org", "localhost"],
    "ipv4": ["10.0.0.1"],
    "ipv6": ["2001:db8::1", "::1"],
    "uuid": ["6f1c1b1e-8f0a-4c53-9d3e-0a1b2c3d4e5f"],
    "uri": ["https://example.org/path"],
}

_PATTERNS: list[tuple[str, list[str]]] = [
    ("^[a-z]+(_[a-z]+)*$", ["snake_case", "one"]),
    ("^#[0-9a-fA-F]{6}$", ["#a0B1c2"]),
    (r"^\d{3}-\d{4}$", ["555-0199"]),
    (r"^\+?[0-9 ]{7,15}$", ["+44 20 7946", "5550199"]),
    ("^[A-Z][a-z]+( [A-Z][a-z]+)*$", ["Ada", "Grace Hopper"]),
    ("^(yes|no|maybe)$", ["yes", "maybe"]),
    (r"^v?\d+\.\d+\.\d+(-[a-z0-9.]+)?$", ["v1.2.3", "0.10.0-rc.1"]),
    ("^[^@]+@[^@]+$", ["a@b"]),
    ("^.{3,8}$", ["four", "12345678"]),
    (r"^[\w.-]+\.(png|jpe?g|gif)$", ["photo.jpeg", "a-b.png"]),
    ("^(0|[1-9][0-9]*)$", ["0", "42"]),
    ("^[A-Z]{2}[0-9]{2}( ?[A-Z0-9]{4}){3,7}$", ["DE89 3704 0044 0532", "GB29NWBK60161331"]),
    ("^(?:[01][0-9]|2[0-3]):[0-5][0-9]$", ["08:15", "23:59"]),
    ("^(/[a-z0-9-]+)+/?$", ["/usr/local", "/a/b/"]),
    ("id$", ["valid", "an id"]),
    ("[0-9]", ["x1y", "7"]),
    ("^[äöüß ]+$", ["äö", "ß ü"]),
    (r"^[A-Za-z0-9+/]{4,}={0,2}$", ["aGVsbG8=", "abcd"]),
    (r"^\$\{[A-Z_]+\}$", ["${HOME}", "${A_B}"]),
    ('^[^\\\\"\n]*$', ["plain", ""]),
]


def schemas() -> Iterator[dict[str, Any]]:
    """Yield each entry of the file: its name, its group, the schema as JSON, and values as JSON."""
    rng = random.Random(SEED)
    for group, count, make in _GROUPS:
        for number in range(count):
            schema = make(rng, number)
            values = [] if group == "unusual" else [sample(schema, rng) for _ in range(SAMPLES)]
            yield {
                "name": f"{group}-{number}",
                "group": group,
                "schema": json.dumps(schema, ensure_ascii=False),
                "values": [json.dumps(value, ensure_ascii=False) for value in values],
            }


def _fields(rng: random.Random, count: int) -> tuple[str, list[tuple[str, Schema]]]:
    """Return the kind of a record, and some of its fields."""
    kind = rng.choice(list(_RECORDS))
    chosen = sorted(rng.sample(range(len(_RECORDS[kind])), min(count, len(_RECORDS[kind]))))
    named = (_RECORDS[kind][place] for place in chosen)
    return kind, [(name, dict(_LEAVES[leaf])) for name, leaf in named]


def _object(
    rng: random.Random, fields: list[tuple[str, Schema]], kind: str = "", closed: float = 0.8
) -> Schema:
    names = [name for name, _ in fields]
    required = [name for name in names if rng.random() < 0.75] or names[:1]
    schema: Schema = {"type": "object", "properties": dict(fields), "required": required}
    if rng.random() < closed:
        schema["additionalProperties"] = False
    return {"title": kind.capitalize(), **schema} if kind and rng.random() < 0.5 else schema


def _flat(rng: random.Random, number: int) -> Schema:
    kind, fields = _fields(rng, rng.randint(2, 8))
    schema = _object(rng, fields, kind)
    if number % 8 == 0:
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    if number % 8 == 1:
        schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    if number % 3 == 0:
        for name, each in fields:
            each["description"] = f"The {name.replace('_', ' ')} of the {kind}"
    return schema


def _nested(rng: random.Random, number: int, depth: int = 0) -> Schema:
    kind, fields = _fields(rng, rng.randint(2, 4))
    for name in rng.sample(["details", "owner", "meta", "origin"], rng.randint(1, 2)):
        deeper = depth < 1 + number % 3
        inner = _nested(rng, number, depth + 1) if deeper else _object(rng, _fields(rng, 3)[1])
        fields.insert(rng.randint(0, len(fields)), (name, inner))
    return _object(rng, fields, kind)


def _arrays(rng: random.Random, number: int) -> Schema:
    kind, fields = _fields(rng, 3)
    item = _object(rng, fields, kind)
    bounds: Schema = [{}, {"minItems": 1}, {"maxItems": 4}, {"minItems": 2, "maxItems": 3}][number % 4]
    match number % 5:
        case 0:
            return {"type": "array", "items": item, **bounds}
        case 1:
            pair = [{"type": "string"}, {"type": "integer"}]
            return {"type": "array", "prefixItems": pair, "items": False, "minItems": 2}
        case 2:
            matrix = {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "maxItems": 3}}
            return _object(rng, [("matrix", {**matrix, "maxItems": 3})])
        case 3:
            return _object(
                rng,
                [("total", {"type": "integer"}), (f"{kind}s", {"type": "array", "items": item, **bounds})],
            )
        case _:
            head = [{"enum": ["point", "line"]}, {"type": "number"}]
            rest = {
                "type": "array",
                "prefixItems": head,
                "items": {"type": "number"},
                "minItems": 2,
                "maxItems": 5,
            }
            return _object(rng, [("shape", rest)])


def _enums(rng: random.Random, number: int) -> Schema:
    name, values = rng.choice(list(_ENUMS.items()))
    match number % 6:
        case 0:
            return {"enum": values}
        case 1:
            return _object(rng, [("kind", {"const": name}), ("value", {"enum": [*values, None]})])
        case 2:
            return {"type": "array", "items": {"enum": values}, "minItems": 1, "maxItems": 3}
        case 3:
            return _object(rng, [("answer", {"enum": [1, 2.5, "three", True, None, {"four": [4]}]})])
        case 4:
            many = [f"{name}_{place:03d}" for place in range(50 + 10 * number)]
            return _object(rng, [("choice", {"type": "string", "enum": many}), ("why", {"type": "string"})])
        case _:
            return _object(
                rng,
                [
                    ("version", {"const": 3}),
                    ("label", {"const": 'a "quoted"\nlabel'}),
                    ("on", {"const": True}),
                ],
            )


def _formats(rng: random.Random, number: int) -> Schema:
    name = list(_FORMATS)[number % len(_FORMATS)]
    leaf = {"type": "string", "format": name, "examples": _FORMATS[name]}
    if number < len(_FORMATS):
        return _object(rng, [("value", leaf)])
    more = {"type": ["string", "null"], "format": name, "examples": [*_FORMATS[name], None]}
    return _object(rng, [("first", leaf), ("others", {"type": "array", "items": more, "maxItems": 2})])


def _patterns(rng: random.Random, number: int) -> Schema:
    pattern, examples = _PATTERNS[number % len(_PATTERNS)]
    leaf: Schema = {"type": "string", "pattern": pattern, "examples": examples}
    if number % 3 == 0:
        leaf |= {"minLength": 1, "maxLength": 40, "examples": [each for each in examples if each]}
    return _object(rng, [("text", leaf), ("count", dict(_LEAVES["count"]))])


def _numbers(rng: random.Random, number: int) -> Schema:
    low = rng.choice([-1000, -5, 0, 1, 7])
    high = low + rng.choice([1, 10, 1000, 123456])
    leaves: list[Schema] = [
        {"type": "integer", "minimum": low, "maximum": high},
        {"type": "number", "minimum": low, "maximum": high},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
        {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 10},
        {"type": "integer", "maximum": high},
        {"type": "number", "minimum": low + 0.5},
        {"type": "integer", "multipleOf": 3, "minimum": 0},
        {"type": "number", "minimum": -90, "maximum": 90},
    ]
    first, second = leaves[number % len(leaves)], leaves[(3 * number + 1) % len(leaves)]
    return _object(rng, [("first", first), ("second", second)])


def _unions(rng: random.Random, number: int) -> Schema:
    _, fields = _fields(rng, 2)
    _, others = _fields(rng, 2)

    def tagged(tag: str, more: list[tuple[str, Schema]]) -> Schema:
        schema = _object(rng, [("type", {"const": tag}), *more])
        return {
            **schema,
            "required": sorted({"type", *schema["required"]}, key=list(schema["properties"]).index),
        }

    match number % 7:
        case 0:
            return _object(
                rng, [("value", {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]})]
            )
        case 1:
            return {"anyOf": [_object(rng, fields, closed=1), _object(rng, others, closed=1)]}
        case 2:
            return {"oneOf": [tagged("circle", fields), tagged("square", others)]}
        case 3:
            return _object(
                rng,
                [("item", {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})],
            )
        case 4:
            parts = [_object(rng, part, closed=0) for part in (fields, others)]
            examples = [
                sample({**parts[0], "properties": parts[0]["properties"]}, rng) | sample(parts[1], rng)
            ]
            names = [*parts[0]["properties"], *parts[1]["properties"]]
            examples = [
                {name: each[name] for name in dict.fromkeys(names) if name in each} for each in examples
            ]
            if set(parts[0]["properties"]) & set(parts[1]["properties"]):
                return {"allOf": parts[:1], "examples": [sample(parts[0], rng)]}
            return {"allOf": parts, "examples": examples}
        case 5:
            limits = [{"minimum": 3}, {"maximum": 9}]
            return _object(rng, [("rank", {"type": "integer", "allOf": limits, "examples": [3, 5, 9]})])
        case _:
            members = [tagged(tag, part) for tag, part in (("a", fields), ("b", others), ("c", []))]
            return {"type": "array", "items": {"anyOf": members}, "minItems": 1, "maxItems": 3}


def _references(rng: random.Random, number: int) -> Schema:
    kind, fields = _fields(rng, 3)
    key = "$defs" if number % 2 else "definitions"
    match number % 5:
        case 0:
            node = _object(
                rng,
                [*fields, ("children", {"type": "array", "items": {"$ref": f"#/{key}/node"}, "maxItems": 2})],
                closed=1,
            )
            node["required"] = [name for name in node["required"] if name != "children"]
            return {"$ref": f"#/{key}/node", key: {"node": node}}
        case 1:
            next_ = {"anyOf": [{"$ref": "#/$defs/link"}, {"type": "null"}]}
            link = {
                "type": "object",
                "properties": {"value": {"type": "integer"}, "next": next_},
                "required": ["value", "next"],
                "additionalProperties": False,
            }
            return {"$defs": {"link": link}, "$ref": "#/$defs/link"}
        case 2:
            address = _object(
                rng,
                [
                    ("street", {"type": "string"}),
                    ("zip", {"type": "string", "pattern": "^[0-9]{5}$", "examples": ["12345"]}),
                ],
                closed=1,
            )
            both = [("billing", {"$ref": f"#/{key}/address"}), ("shipping", {"$ref": f"#/{key}/address"})]
            return {**_object(rng, [*fields, *both]), key: {"address": address}}
        case 3:
            level = {"enum": ["low", "high"], "title": "Level", "type": "string"}
            member = {
                "title": kind.capitalize(),
                "type": "object",
                "properties": {**dict(fields), "level": {"$ref": "#/$defs/Level"}},
                "required": ["level"],
            }
            body = {"members": {"title": "Members", "type": "array", "items": {"$ref": "#/$defs/Member"}}}
            return {
                "$defs": {"Level": level, "Member": member},
                "title": "Team",
                "type": "object",
                "properties": body,
                "required": ["members"],
            }
        case _:
            operand = {"anyOf": [{"type": "number"}, {"$ref": "#"}]}
            return {
                "type": "object",
                "properties": {"op": {"enum": ["+", "-", "*", "/"]}, "left": operand, "right": operand},
                "required": ["op", "left", "right"],
                "additionalProperties": False,
            }


def _maps(rng: random.Random, number: int) -> Schema:
    leaf = dict(rng.choice([_LEAVES["count"], _LEAVES["texts"], _LEAVES["flag"], _LEAVES["price"]]))
    match number % 4:
        case 0:
            return {"type": "object", "additionalProperties": leaf}
        case 1:
            return _object(
                rng,
                [("name", {"type": "string"}), ("scores", {"type": "object", "additionalProperties": leaf})],
            )
        case 2:
            by_name = {"^[a-z]{1,8}$": leaf}
            return {"type": "object", "patternProperties": by_name, "additionalProperties": False}
        case _:
            names = {"pattern": "^[A-Z]{3}$"}
            return {"type": "object", "propertyNames": names, "additionalProperties": leaf, "examples": [{}]}


def _large(rng: random.Random, number: int) -> Schema:
    leaves = [leaf for kind in _RECORDS.values() for _, leaf in kind]
    fields = [(f"field_{place:03d}", dict(_LEAVES[rng.choice(leaves)])) for place in range(100)]
    schema = _object(rng, fields, closed=1)
    schema["required"] = [name for name, _ in fields if rng.random() < 0.05 + 0.02 * number]
    return schema


def _unusual(rng: random.Random, number: int) -> Schema:
    copied: Schema = json.loads(json.dumps(_UNUSUAL[number]))
    return copied


def _with(**keywords: Any) -> Schema:
    return {
        "type": "object",
        "properties": {"value": keywords, "note": {"type": "string"}},
        "required": ["value"],
    }


_UNUSUAL: list[Schema] = [
    _with(type="array", items={"type": "string"}, uniqueItems=True),
    _with(type="array", contains={"type": "integer"}),
    _with(type="string", **{"not": {"enum": ["none"]}}),
    {**_with(type="string"), "if": {"properties": {"value": {"const": "a"}}}, "then": {"required": ["note"]}},
    {**_with(type="string"), "dependentRequired": {"note": ["value"]}},
    _with(**{"$ref": "https://example.org/schemas/address.json"}),
    _with(
        oneOf=[
            {"type": "object", "properties": {"a": {"type": "string"}}},
            {"type": "object", "properties": {"b": {"type": "string"}}},
        ]
    ),
    _with(type="string", format="phone"),
    _with(type="string", pattern="^(?=.*[0-9])(?=.*[a-z]).{8,}$"),
    _with(type="string", pattern=r"^(.)\1$"),
    {**_with(type="string"), "minProperties": 2, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "string"}}},
    _with(type="object", unevaluatedProperties=False, allOf=[{"properties": {"a": {"type": "integer"}}}]),
    _with(type="string", format="password"),
    _with(type="array", items={"type": "integer"}, uniqueItems=False),
    _with(type="integer", format="int64", nullable=True),
    {
        **_with(type="string", contentEncoding="base64", readOnly=True),
        "x-go-type": "Value",
        "example": {"value": "eA=="},
    },
    {
        "type": "object",
        "propertyNames": {"enum": ["left", "right"]},
        "additionalProperties": {"type": "integer"},
    },
    _with(type="object", properties={"a": {"type": "integer"}}, unevaluatedProperties=False),
    {"properties": {"loose": {"type": "string"}}, "required": ["loose"]},
]

_GROUPS: list[tuple[str, int, Callable[[random.Random, int], Schema]]] = [
    ("flat", 56, _flat),
    ("nested", 40, _nested),
    ("arrays", 30, _arrays),
    ("enums", 24, _enums),
    ("formats", 20, _formats),
    ("patterns", 20, _patterns),
    ("numbers", 20, _numbers),
    ("unions", 26, _unions),
    ("references", 20, _references),
    ("maps", 14, _maps),
    ("large", 10, _large),
    ("unusual", len(_UNUSUAL), _unusual),
]
