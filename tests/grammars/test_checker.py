"""Grammars are checked in a process of its own: problems have a place, and crashes harm nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from headrace.grammars import forms
from headrace.grammars.checker import Checker
from headrace.grammars.problems import FormProblem

GOOD = forms.json_schema_grammar('{"type": "object"}').text
ENDLESS_RULES = "\n".join(
    ["start: r0", *(f"r{number}: r{number + 1}" for number in range(3500)), 'r3500: "a"']
)


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    made = Checker(lambda: ([bytes([byte]) for byte in range(256)], {"<|end|>": 255}))
    yield made
    made.close()


def _schema(schema: dict[str, Any]) -> forms.Part:
    return forms.json_schema_grammar(json.dumps(schema))


def _one(name: int, value: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{name}": {"const": value}}}


def problem(checker: Checker, grammar: str) -> FormProblem:
    with pytest.raises(FormProblem) as caught:
        checker.check(grammar)
    return caught.value


@pytest.mark.parametrize(
    ("schema", "place", "words"),
    [
        ({"not": {}}, "/not", "'not'"),
        ({"properties": {"a/b": {"anyOf": [{}, {"if": {}}]}}}, "/properties/a~1b/anyOf/1/if", "'if'"),
        ({"$defs": {"x": {"not": {}}}, "items": {"$ref": "#/$defs/x"}}, "/$defs/x/not", "'not'"),
        ({"prefixItems": [{}, {"uniqueItems": True}]}, "/prefixItems/1/uniqueItems", "'uniqueItems'"),
        ({"allOf": [{"dependentSchemas": {}}]}, "/allOf/0/dependentSchemas", "'dependentSchemas'"),
        ({"properties": {"p": {"pattern": "a(?!b)"}}}, "/properties/p/pattern", "look-ahead"),
        ({"properties": {"p": {"pattern": "(a"}}}, "/properties/p/pattern", "unclosed group"),
        ({"properties": {"p": {"pattern": r"\bx"}}}, "/properties/p/pattern", r"\b"),
        ({"items": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "/items/oneOf", "anyOf"),
        ({"items": {"type": "word"}}, "/items/type", "none of array"),
        ({"items": {"minLength": -1}}, "/items/minLength", "positive integer"),
        (
            {"type": "object", "required": ["a"], "properties": {"a": {"type": "string", "enum": [1]}}},
            "/properties/a",
            "no value",
        ),
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a"], "minProperties": 2},
            "/minProperties",
            "required",
        ),
        ({"patternProperties": {"^a": {"type": "null"}, "b$": {"type": "string"}}}, "", "disjoint"),
    ],
)
def test_a_schema_that_is_not_enforced_is_rejected_with_its_place(
    checker: Checker, schema: dict[str, Any], place: str, words: str
) -> None:
    found = problem(checker, forms.json_schema_grammar(json.dumps(schema)).text)

    assert found.place == place
    assert words in found.message


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda: forms.regex("(a"), "unclosed group"),
        (lambda: forms.regex("a(?=b)"), "look-ahead"),
        (lambda: forms.lark('root ::= "a" | "b"'), "Lark"),
        (lambda: forms.lark("start: missing"), "missing"),
        (lambda: forms.lark("start: (((("), "Expected"),
        (lambda: forms.lark("start: start"), "no text matches"),
        (lambda: forms.lark("start: @other"), "other"),
        (lambda: forms.lark("start: <|none|>"), "none"),
    ],
)
def test_other_forms_that_do_not_work_are_rejected_with_the_reason(
    checker: Checker, part: Any, words: str
) -> None:
    found = problem(checker, part().text)

    assert words in found.message
    assert found.message.isprintable()


def test_a_problem_names_the_part_of_the_grammar_that_has_it(checker: Checker) -> None:
    parts = {"one": forms.json_object(), "two": forms.json_schema_grammar('{"items": {"not": {}}}')}
    found = problem(checker, forms.to_text("start: @one | @two", parts))

    assert (found.part, found.place) == ("two", "/items/not")


@pytest.mark.parametrize(
    "part",
    [
        forms.regex("[a-z]+x"),
        forms.json_schema_grammar('{"const": "forced"}'),
        forms.choices(["forced too"]),
        forms.lark("start: /a+/ <|end|>"),
    ],
)
def test_grammars_without_a_problem_pass(checker: Checker, part: forms.Part) -> None:
    checker.check(part.text)


def test_a_grammar_that_was_checked_is_known_with_its_problem() -> None:
    checker = Checker(lambda: ([bytes([byte]) for byte in range(256)], {}))
    bad = forms.json_schema_grammar('{"not": {}}').text
    assert not checker.is_known(GOOD)
    checker.check(GOOD)
    first = problem(checker, bad)
    checker.close()

    assert checker.is_known(GOOD)
    assert checker.is_known(bad)
    checker.check(GOOD)
    assert problem(checker, bad).place == first.place == "/not"
    assert checker._process is None, "known grammars need no process"


@pytest.mark.parametrize(
    "grammar",
    [
        # The compiler takes seconds, for each pair of patterns.
        forms.json_schema_grammar(
            json.dumps({"patternProperties": {f"^p{number}x": {"type": "null"} for number in range(400)}})
        ).text,
        # The compiler overflows its stack: in a range up to -2^63, and in a chain of rules.
        forms.lark('start: %json {"const": -9223372036854775808}').text,
        forms.lark(ENDLESS_RULES).text,
    ],
    ids=["slow", "range", "chain"],
)
def test_a_grammar_that_harms_the_compiler_is_rejected_and_the_next_one_is_checked(
    checker: Checker, grammar: str
) -> None:
    found = problem(checker, grammar)
    checker.check(GOOD)

    assert "make it simpler" in found.message


@pytest.mark.parametrize(
    "part",
    [
        lambda: forms.regex("((a{1,1000}){1,1000}){1,1000}"),
        lambda: forms.regex("(a|b)*a(a|b){1000}"),
        lambda: forms.regex("(x+x+)+y"),
        lambda: forms.lark('start: "a"{1000000000}'),
        lambda: forms.lark('start: A\nA: "a"{1000000000}'),
        lambda: forms.lark('start: start start | "a"'),
        lambda: forms.json_schema_grammar('{"type": "string", "minLength": 1000000000}'),
        lambda: forms.json_schema_grammar('{"type": "array", "minItems": 1000000000}'),
        lambda: _schema({"enum": [f"v{number}" for number in range(6000)]}),
        lambda: _schema({"properties": {f"p{number}": {"not": {}} for number in range(2000)}}),
        lambda: _schema({"allOf": [{"anyOf": [_one(i, j) for j in range(4)]} for i in range(12)]}),
    ],
)
def test_grammars_that_multiply_end_in_a_problem_or_work(checker: Checker, part: Any) -> None:
    with suppress(FormProblem):
        checker.check(part().text)
    checker.check(GOOD)


def test_a_grammar_is_checked_again_if_the_process_was_killed_from_outside() -> None:
    checker = Checker(lambda: ([bytes([byte]) for byte in range(256)], {}))
    checker.start()
    assert checker._process is not None
    checker._process.kill()

    checker.check(GOOD)

    checker.close()


def test_a_check_that_the_end_of_the_batcher_interrupts_is_no_problem_of_the_grammar() -> None:
    checker = Checker(lambda: ([bytes([byte]) for byte in range(256)], {}))
    checker.start()
    checker.close()

    with pytest.raises(RuntimeError, match="closed"):
        checker.check(GOOD)
    assert not checker.is_known(GOOD)
    assert checker._process is None


def test_a_vocabulary_is_read_once_however_often_the_process_starts() -> None:
    reads = []

    def tokens() -> tuple[list[bytes], dict[str, int]]:
        reads.append(1)
        return [bytes([byte]) for byte in range(256)], {}

    checker = Checker(tokens)
    for number in range(2):
        problem(checker, forms.lark(f"{ENDLESS_RULES}\n// {number}").text)
    checker.close()

    assert len(reads) == 1
