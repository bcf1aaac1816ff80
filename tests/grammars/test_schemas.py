"""Answers of a JSON schema match it by an independent judge, and what cannot be enforced is rejected."""

from __future__ import annotations

import json
import random
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.structured.data import Entry, entries, fault
from headrace.grammars import finiteness
from headrace.grammars.forms import json_schema_grammar
from headrace.grammars.problems import FormProblem
from headrace.grammars.schemas import MAX_DEPTH
from tests.grammars.walks import accepts, walk

NAMES = st.sampled_from(["a", "b c", "é", 'q"q', "n\nn", "/~"])
ANSWERS = 3  # of each schema
DRAFT_7 = "http://json-schema.org/draft-07/schema#"

USUAL = [entry for entry in entries() if entry.group != "unusual"]
BOUNDS = st.integers(-1000, 1000)


def _in(kind: str, least: str, most: str, low: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """Return schemas of a kind between two bounds, which are keywords."""
    return st.builds(lambda low, more: {"type": kind, least: low, most: low + more}, low, st.integers(1, 99))


def _strings(keyword: str, *values: str) -> st.SearchStrategy[Any]:
    return st.sampled_from([{"type": "string", keyword: value} for value in values])


SCALARS = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")]),
    _in("integer", "minimum", "maximum", BOUNDS),
    _in("number", "exclusiveMinimum", "maximum", BOUNDS),
    _in("string", "minLength", "maxLength", st.integers(0, 3)),
    _strings("format", "date", "time", "date-time", "uuid", "ipv4", "duration"),
    _strings("pattern", "^a[0-9]+$", "^(x|yy){1,2}$", r'^["\\/]$', "^é?$"),
    st.lists(st.one_of(st.text(max_size=3), BOUNDS, st.booleans(), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.integers(1, 50).map(lambda step: {"type": "integer", "multipleOf": step}),
)


def _object(fields: dict[str, Any], required: int, more: Any) -> dict[str, Any]:
    names = [name for place, name in enumerate(fields) if required >> place & 1]
    return {"type": "object", "properties": fields, "required": names, "additionalProperties": more}


def _list(items: Any, least: int, more: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}


def _tuple(head: list[Any], items: Any) -> dict[str, Any]:
    return {"type": "array", "prefixItems": head, "items": items, "minItems": len(head)}


def _compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few, maybe = st.integers(0, 2), st.one_of(st.booleans(), inner)
    return st.one_of(
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 7), maybe),
        st.builds(_list, inner, few, few),
        st.builds(_tuple, st.lists(inner, min_size=1, max_size=2), maybe),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        inner.map(lambda each: {"allOf": [each], "description": "x"}),
    )


SCHEMAS = st.recursive(SCALARS, _compound, max_leaves=6)


@pytest.mark.parametrize("schema", [{"enum": ["0\x1f"]}, {"enum": ["\x7f"]}, {"const": {"a": ["\x00"]}}])
def test_control_characters_in_constants_are_rejected(schema: dict[str, Any]) -> None:
    with pytest.raises(FormProblem, match="control characters"):
        json_schema_grammar(json.dumps(schema))


@pytest.mark.parametrize("schema", [{"const": {"a\x1f": 1}}, _object({"a\x1f": {"const": 1}}, 1, False)])
def test_control_characters_in_names_are_written(schema: dict[str, Any]) -> None:
    assert walk(json_schema_grammar(json.dumps(schema)).text, random.Random(0)) == '{"a\\u001f": 1}'


@settings(max_examples=150, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_answers_of_random_schemas_match_them(schema: dict[str, Any], seed: int) -> None:
    text = json.dumps(schema)
    try:
        grammar = json_schema_grammar(text).text
    except FormProblem as problem:
        if "control characters" not in problem.message:
            raise
        return
    for number in range(ANSWERS):
        answer = walk(grammar, random.Random(f"{seed}-{number}"))
        assert answer is None or not fault(text, answer)


@pytest.mark.parametrize("entry", USUAL[::6], ids=lambda entry: entry.name)
def test_answers_of_usual_schemas_match_them_and_their_values_are_allowed(entry: Entry) -> None:
    grammar = json_schema_grammar(entry.schema).text
    assert all(accepts(grammar, value) for value in entry.values)
    for number in range(ANSWERS):
        answer = walk(grammar, random.Random(f"{entry.name}-{number}"))
        assert answer is None or not fault(entry.schema, answer)


KEYWORDS = st.sampled_from(
    [
        *("$ref", "$schema", "$defs", "type", "properties", "required", "additionalProperties", "items"),
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "prefixItems", "minItems"),
        *("maxItems", "uniqueItems", "unevaluatedProperties", "unevaluatedItems", "allOf", "anyOf", "oneOf"),
        *("enum", "const", "format", "pattern", "minimum", "maximum", "x-guidance", "not", "a"),
    ]
)
WORDS = st.sampled_from(["string", "integer", "object", "array", "#", "#/$defs/a", "#/items", "date", "a"])
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(-3, 3), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYWORDS, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(schema=st.dictionaries(KEYWORDS, ANYTHING, max_size=5))
def test_a_schema_of_any_content_is_read_or_rejected(schema: dict[str, Any]) -> None:
    with suppress(FormProblem):
        json_schema_grammar(json.dumps(schema))


def _with(**keywords: Any) -> str:
    return json.dumps({"type": "object", "properties": {"v": keywords}, "required": ["v"]})


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ("", ""),
        ("[]", ""),
        ('{"a": NaN}', ""),
        ('{"const": 1e999}', ""),
        ('{"const": "\\ud800"}', ""),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, ""),
        (json.dumps({"description": "x" * 65_536}), ""),
        (_with(**{"$ref": "https://example.org/a.json"}), "/properties/v/$ref"),
        (_with(**{"$ref": "other.json#/x"}), "/properties/v/$ref"),
        (_with(type="string", format="phone"), "/properties/v/format"),
        (_with(type=["string", "null"], format="regex"), "/properties/v/format"),
        (_with(const=2**53 + 1), "/properties/v/const"),
        (_with(enum=[1, {"a": [-(2**63)]}]), "/properties/v/enum"),
        (_with(type="object", minProperties=2), "/properties/v/minProperties"),
        (_with(**{"$ref": "#/$defs/missing"}), "/properties/v/$ref"),
        ('{"$ref": "#"}', ""),
        ('{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}', ""),
        (_with(**{"anyOf": [{"$ref": "#/properties/v"}]}), ""),
        (
            json.dumps({"$defs": {"n": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/n"}}}}),
            "/$defs/n",
        ),
    ],
)
def test_a_schema_that_cannot_be_read_or_enforced_is_rejected_with_the_place(schema: str, place: str) -> None:
    with pytest.raises(FormProblem) as caught:
        json_schema_grammar(schema)

    assert caught.value.place == place


def test_what_is_in_each_other_is_bounded_with_the_place() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_DEPTH // 2):
        schema = {"type": "array", "items": schema, "default": []}
    json_schema_grammar(json.dumps(schema["items"]["items"]))
    deep = {"const": json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)}

    with pytest.raises(FormProblem) as caught:
        json_schema_grammar(json.dumps(deep))
    assert caught.value.place == "/const" + "/0" * (MAX_DEPTH - 1)


@pytest.mark.parametrize(
    ("schema", "matching", "others"),
    [
        # A property cannot be repeated under another spelling of its name.
        (
            {"properties": {"a": {"type": "integer"}}, "required": ["a"], "type": "object"},
            ['{"a": 1, "b": "x"}'],
            ['{"a": 1, "\\u0061": "x"}', '{"a": 1, "a": "x"}'],
        ),
        ({"type": "object", "x-guidance": {"lenient": True, "whitespace_flexible": True}}, ["{}"], ["{ }"]),
        ({"type": "array", "uniqueItems": False}, ["[1, 1]"], []),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, ["[1]"], ["[1, 1]"]),
        (
            {"type": "object", "properties": {"a": True}, "unevaluatedProperties": False},
            ['{"a": 1}'],
            ['{"b": 1}'],
        ),
        (
            {
                "type": "object",
                "propertyNames": {"enum": ["x", "y"]},
                "additionalProperties": {"type": "null"},
            },
            ['{"x": null}', "{}"],
            ['{"z": null}', '{"x": 1}'],
        ),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, ['{"ab": 1}'], ['{"b": 1}']),
        ({"type": "integer", "format": "int64", "nullable": True}, ["5"], ["null", "1" * 19]),
        (
            {"type": "string", "format": "date"},
            ['"2024-02-29"'],
            ['"2023-02-29"', '"0000-01-01"', '"1900-02-29"'],
        ),
        ({"type": "string", "format": "date", "pattern": "^2"}, ['"2000-02-29"'], ['"1999-01-01"']),
        ({"type": "string", "format": "date-time"}, ['"2024-02-29T23:59:59.5Z"'], ['"2024-02-29T23:59:60Z"']),
        ({"$schema": "https://example.org/own", "type": "null"}, ["null"], ["1"]),
        # What pydantic writes for Decimal, Base64Bytes, UUID4, IPvAnyAddress, Path, and dictionaries.
        (
            {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
            ['"-12.50"', '".5"', '"7."'],
            ['""', '"-"', '"."', '"1.2.3"', '"x"'],
        ),
        ({"type": "string", "format": "base64"}, ['""', '"YQ=="', '"YWI="', '"YWJj"'], ['"YQ"', '"YR=="']),
        ({"type": "string", "format": "base64url"}, ['"-_-_"'], ['"+/+/"']),
        (
            {"type": "string", "format": "uuid4"},
            ['"3f2504e0-4f89-41d3-9a0c-0305e82c3301"'],
            ['"3f2504e0-4f89-11d3-9a0c-0305e82c3301"', '"3f2504e0-4f89-41d3-7a0c-0305e82c3301"'],
        ),
        ({"type": "string", "format": "ipvanyaddress"}, ['"10.0.0.1"', '"::1"'], ['"10.0.0"', '"x"', "1"]),
        (
            {"type": ["string", "null"], "format": "ipvanyaddress"},
            ["null", '"::1"'],
            ['"x"', "1"],
        ),
        ({"type": "string", "format": "path"}, ['"any text"'], ["1"]),
        (
            {
                "type": "object",
                "propertyNames": {"$ref": "#/$defs/Color"},
                "additionalProperties": {"type": "integer"},
                "$defs": {"Color": {"enum": ["red", "blue"], "title": "Color", "type": "string"}},
            },
            ['{"red": 1, "blue": 2}', "{}"],
            ['{"green": 1}', '{"red": "x"}'],
        ),
        ({"type": "object", "propertyNames": {"const": "a"}}, ['{"a": 1}', "{}"], ['{"b": 1}']),
        (
            {"type": "object", "propertyNames": {"format": "date"}},
            ['{"2024-02-29": 1}'],
            ['{"2023-02-29": 1}'],
        ),
        ({"$schema": DRAFT_7, "items": [{"type": "null"}], "type": "array"}, ["[null]"], ["[1]"]),
        ({"type": "number", "multipleOf": 0.1}, ["0.3", "7"], ["0.35"]),
        (
            {"const": {"b": 1, "a": [1.5, "\n"]}},
            ['{"b": 1, "a": [1.5, "\\n"]}'],
            ['{"a": [1.5, "\\n"], "b": 1}'],
        ),
    ],
)
def test_keywords_in_other_words_mean_the_same(
    schema: dict[str, Any], matching: list[str], others: list[str]
) -> None:
    grammar = json_schema_grammar(json.dumps(schema)).text

    assert [text for text in matching if not accepts(grammar, text)] == []
    assert [text for text in others if accepts(grammar, text)] == []


def test_recursive_schemas_are_enforced_at_each_depth() -> None:
    kids = {"type": "array", "items": {"$ref": "#/$defs/node"}}
    node = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "kids": kids},
        "required": ["v"],
        "additionalProperties": False,
    }
    grammar = json_schema_grammar(json.dumps({"$defs": {"node": node}, "$ref": "#/$defs/node"})).text

    assert accepts(grammar, '{"v": 1, "kids": [{"v": 2, "kids": []}, {"v": 3}]}')
    assert not accepts(grammar, '{"v": 1, "kids": [{"v": 2, "kids": [{}]}]}')


def test_the_judge_rejects() -> None:
    """Otherwise the tests above prove nothing."""
    assert fault('{"type": "integer"}', "1.5")
    assert fault('{"type": "integer"}', "{")
    assert fault('{"type": "string", "format": "date"}', '"2023-02-29"')


@pytest.mark.parametrize(
    "inner", [{"const": [0] * 15_000}, {"properties": {f"{name:x}": {} for name in range(3000)}}]
)
def test_a_long_name_around_many_values_costs_no_memory_for_each(inner: dict[str, Any]) -> None:
    text = json.dumps({"properties": {"n" * 30_000: inner}}, separators=(",", ":"))
    tracemalloc.start()
    try:
        json_schema_grammar(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 100 * len(text), "pointers to all values would be a thousand times the schema"


def test_a_schema_for_names_is_not_written_for_each_of_many() -> None:
    """Within each other, such schemas would multiply."""
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(5):
        names = [f"n{number}" for number in range(40)]
        schema = {"type": "object", "propertyNames": {"enum": names}, "additionalProperties": schema}

    assert len(json_schema_grammar(json.dumps(schema)).text) < 100_000


def test_a_schema_is_not_judged_again_for_each_that_it_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"n{number}" for number in range(300)]
    schema = {
        "type": "object",
        "properties": {**{name: {} for name in names}, "last": {"$ref": "#/properties/n0"}},
        "required": names[::-1],
    }
    judged: list[Any] = []
    judge = finiteness._ends

    def counted(*given: Any) -> bool:
        judged.append(given)
        return judge(*given)

    monkeypatch.setattr(finiteness, "_ends", counted)

    json_schema_grammar(json.dumps(schema))

    assert len(judged) < 1.1 * len(names)
