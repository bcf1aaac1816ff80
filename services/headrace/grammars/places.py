"""Find the place in a JSON schema that llguidance rejects: its messages have none.

The schemas inside of a rejected one are compiled alone, level by level, until one is rejected whose parts are
all accepted. The number of compilations is bounded, so the place found may be an outer one.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

from headrace.grammars.forms import Part
from headrace.grammars.problems import FormProblem
from headrace.grammars.walking import Schema, children, pointer, resolved

MAX_COMPILATIONS = 256
MAX_SECONDS = 0.5
_MAX_MESSAGE = 300  # characters

Compile = Callable[[str], str]  # a grammar to what is wrong with it, or to nothing

_REFERENCE = "\n  while processing json-schema:"  # and the reference that llguidance followed last
NOTHING_MATCHES = "no text matches"
# How messages of llguidance start, the keyword that they are about, and what to report instead.
_MESSAGES = (
    (
        "oneOf constraints",
        "oneOf",
        "that only one of these matches cannot be enforced: use anyOf, or give a required property of each "
        "another const",
    ),
    (
        "min/maxProperties only",
        "minProperties",
        "minProperties and maxProperties cannot be enforced unless all of `properties` are in `required`",
    ),
    (
        "Invalid type:",
        "type",
        "the type is none of array, boolean, integer, null, number, object and string",
    ),
    ("Regex is empty", "", "no text matches all of these restrictions"),
    ("Unsatisfiable schema: Regex is empty", "", "no text matches all of these restrictions"),
    ("NoExtensionBias", "", NOTHING_MATCHES),
)
_OTHER_SYNTAX = "rules are written in Lark's syntax, such as `start: rule`, not with `::=`; "
_LOOKS = {"WordUnicode": r"\b", "WordUnicodeNegate": r"\B", "Start": "^ within it", "End": "$ within it"}
_KEYS = re.compile(r'Unimplemented keys: (\["[^\]]*"\])')


def explain(grammar: str, problem: str, compile: Compile) -> FormProblem:
    """Return why *grammar*, made by `forms`, does not compile, with the part and the place in it.

    problem   what llguidance reports for the grammar
    compile   compiles others
    """
    entries = json.loads(grammar)["grammars"]
    for entry in entries[1:] if len(entries) > 1 else entries:
        name = entry.pop("name", "")
        found = compile(Part(json.dumps(entry)).text)
        if found and isinstance(schema := entry.get("json_schema"), dict):
            place, found = _innermost(schema, found, compile)
            return _described(found, place, schema, name)
        if found:
            hint = _OTHER_SYNTAX if "::=" in entry.get("lark_grammar", "") else ""
            return FormProblem(hint + _described(found, "", {}, "").message, "", name)
    return FormProblem(_described(problem, "", {}, "").message)


def _innermost(schema: Schema, problem: str, compile: Compile) -> tuple[str, str]:
    """Return the pointer of the innermost schema that has the problem, and the problem there."""
    document, problem = _moved(schema), problem.partition(_REFERENCE)[0]
    started, compilations, place, seen = time.monotonic(), 0, "", {""}
    while True:
        best: tuple[str, str] | None = None
        for at in _parts(schema, place):
            if at in seen:
                continue
            seen.add(at)
            compilations += 1
            if compilations > MAX_COMPILATIONS or time.monotonic() > started + MAX_SECONDS:
                return place, problem
            found = compile(_alone(document, at)).partition(_REFERENCE)[0]
            if found == problem:
                best = at, found
                break
            # An unsatisfiable schema makes what requires it unsatisfiable, with another message.
            if best is None and _is_unsatisfiable(found) and _is_unsatisfiable(problem):
                best = at, found
        if best is None:
            return place, problem
        place, problem = best


def _is_unsatisfiable(problem: str) -> bool:
    return problem.startswith("Unsatisfiable")


def _parts(root: Schema, place: str) -> list[str]:
    """Return the pointers of the schemas that the one at *place* has or refers to."""
    found = resolved(root, f"#{place}")
    if found is None or not isinstance(schema := found[1], dict):
        return []
    parts = [place + below for below, _ in children(schema) if not below.startswith(_DEFINITIONS)]
    if "$ref" in schema and (target := resolved(root, schema["$ref"])) is not None:
        parts.append(target[0])
    return parts


_ROOT = "/$defs/root"
_DEFINITIONS = ("/$defs/", "/definitions/")


def _moved(schema: Schema) -> dict[str, Any]:
    """Return a document that restricts nothing and has the schema, with its references, at `_ROOT`."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(each) for each in value]
        if isinstance(value, dict):
            return {
                key: f"#{_ROOT}{each[1:]}"
                if key == "$ref" and isinstance(each, str) and each.startswith("#")
                else moved(each)
                for key, each in value.items()
            }
        return value

    outer: Schema = {key: schema[key] for key in ("x-guidance", "$schema") if key in schema}
    inner = {key: moved(value) for key, value in schema.items() if key not in outer}
    return {**outer, "$defs": {"root": inner}}


def _alone(document: dict[str, Any], place: str) -> str:
    return Part(json.dumps({"json_schema": {**document, "$ref": f"#{_ROOT}{place}"}})).text


def _described(problem: str, place: str, schema: Schema, part: str) -> FormProblem:
    """Return a problem of the schema at *place* in words for people, with the place of the keyword."""
    if found := _KEYS.match(problem):
        names = json.loads(found[1])
        message = (
            f"{' and '.join(map(repr, names))} cannot be enforced: leave it out, and check answers for it"
        )
        return FormProblem(message, place + pointer(names[0]), part)
    here = resolved(schema, f"#{place}")
    keys = here[1] if here is not None and isinstance(here[1], dict) else {}
    for start, keyword, message in _MESSAGES:
        if problem.startswith(start):
            return FormProblem(message, place + (pointer(keyword) if keyword in keys else ""), part)
    text = _short(problem).replace("Unsatisfiable schema: ", "no value matches: ")
    named = [key for key in re.findall(r"\w+", text) if key in keys]
    keyword = "pattern" if "regex" in problem and "pattern" in keys else next(iter(named), "")
    return FormProblem(text, place + (pointer(keyword) if keyword else ""), part)


def _short(problem: str) -> str:
    """Return a message of llguidance in one line, without its dumps of the parser and of the grammar."""
    text = problem.partition("\n<state>")[0].partition(_REFERENCE)[0]
    if "regex" in text and (reason := re.search(r"\nerror: (.*)", text)):
        text = f"the regular expression is not valid: {reason[1]}"
    elif (look := re.search(r"lookarounds not supported yet; (\w+)", text)) is not None:
        text = f"the regular expression has {_LOOKS.get(look[1], look[1])}, which cannot be enforced"
    text = " ".join(text.split()) or NOTHING_MATCHES
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."
