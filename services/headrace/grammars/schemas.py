"""Read JSON schemas within bounds, and prepare them for llguidance.

llguidance rejects most keywords that it cannot enforce. What it would leave unenforced is rejected here, with
its place, or written in other words: each value that an answer may have matches the caller's schema. Some
matching values are left out, such as integers of more than 18 digits. `walking` knows where a schema has
others, and `finiteness` finds those that no value can match.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from headrace.grammars.finiteness import first_endless
from headrace.grammars.problems import FormProblem
from headrace.grammars.walking import Place, Schema, depth_exceeded, resolved, subschemas
from headrace.quoting import clipped

MAX_SCHEMA_BYTES = 64 << 10
MAX_DEPTH = 100  # lists and objects in each other; llguidance reads 128
_EXACT = 2**53  # constants up to here are written as they were read
_MOST_DIGITS = 10**18 - 1  # of integers without bounds: models may repeat digits until the answer is cut off

_MOST_REPEATED = 16 << 10  # characters of a schema that is written for each of several names

_OPTIONS = "x-guidance"  # the key of llguidance's options: one in a caller's schema could switch checks off
# With spaces as in Python's and most models' JSON, and no other: models may repeat white space until the
# answer is cut off. No \uXXXX: a property could be repeated under another spelling.
_WRITTEN = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
    "coerce_one_of": False,
    "lenient": False,
}
ANY_OBJECT: Schema = {_OPTIONS: _WRITTEN, "type": "object"}

_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_NOT_ONLY_SIGNS = "^(?!^[-+.]*$)"
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = (
    "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # years from 4
)
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
# llguidance's own accept the 29th of February in each year, the year 0 and leap seconds in each minute, which
# most libraries cannot read.
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
# Formats of pydantic and OpenAPI. In the end of base64, the bits that are left over are 0.
_BASE64 = "(?:{0}{{4}})*(?:{0}[AQgw]==|{0}{{2}}[AEIMQUYcgkosw048]=)?"
_PATTERNS |= dict.fromkeys(("base64", "byte"), f"^{_BASE64.format('[A-Za-z0-9+/]')}$")
_PATTERNS["base64url"] = f"^{_BASE64.format('[A-Za-z0-9_-]')}$"
for _version in range(1, 9):
    _PATTERNS[f"uuid{_version}"] = (
        f"^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{_version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}$"
    )
_FREE_FORMATS = frozenset(("binary", "directory-path", "file-path", "password", "path"))  # of any text
_APPLIED = ("$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "$dynamicRef", "$recursiveRef")
_DRAFT = re.compile(r"https?://json-schema\.org/draft(-0[467]/schema#?|/20(19-09|20-12)/schema#?)")


def read_schema(text: str) -> Schema:
    """Return a caller's schema as llguidance should read it. Raises FormProblem."""
    schema = parse_schema(text)
    if (deep := depth_exceeded(schema, MAX_DEPTH)) is not None:
        raise FormProblem(f"more than {MAX_DEPTH} lists and objects are in each other", str(deep))
    if not _DRAFT.fullmatch(str(schema.get("$schema", ""))):
        schema.pop("$schema", None)
    _check_targets(schema)
    _copy_names(schema)
    found = list(subschemas(schema))
    for place, each in found:
        for prepare in _PREPARATIONS:
            prepare(each, place)
    for _, each in reversed(found):  # inner ones first, so that what is repeated has its size
        _write_names(each)
    if (endless := first_endless(schema)) is not None:
        raise FormProblem("no value ends: each one contains another one of the same schema", str(endless))
    return {_OPTIONS: _WRITTEN, **schema}


def parse_schema(text: str) -> Schema:
    """Return the object that *text* has as JSON. Raises FormProblem."""
    if len(text) > MAX_SCHEMA_BYTES or len(text.encode()) > MAX_SCHEMA_BYTES:
        raise FormProblem(f"the schema has more than {MAX_SCHEMA_BYTES} bytes")
    try:
        schema = json.loads(text, parse_constant=_no_constant)
        json.dumps(
            schema, ensure_ascii=False, allow_nan=False
        ).encode()  # no 1e999, no half of a surrogate pair
    except RecursionError:
        raise FormProblem(f"more than {MAX_DEPTH} lists and objects are in each other") from None
    except ValueError as error:
        raise FormProblem(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise FormProblem('the schema is not a JSON object such as {"type": "object"}')
    return schema


def _no_constant(name: str) -> None:
    raise ValueError(f"it has {name}, which is not a JSON number")


def _check_targets(schema: Schema) -> None:
    """Find references to nothing. Where `$id` starts a document of its own, llguidance finds them."""
    everything = list(subschemas(schema))
    if any("$id" in each and each is not schema for _, each in everything):
        return
    for place, each in everything:
        reference = each.get("$ref")
        if not (isinstance(reference, str) and reference.startswith("#/")) or "%" in reference:
            continue
        if resolved(schema, reference) is None:
            raise FormProblem(f"the schema has no {clipped(reference[1:], 64)}", f"{place}/$ref")


def _check_reference(schema: Schema, place: Place) -> None:
    reference = schema.get("$ref")
    if "$ref" in schema and not (isinstance(reference, str) and reference.startswith("#")):
        raise FormProblem(
            "references outside of the schema are not fetched: copy what it refers to into $defs, and refer "
            'to it as "#/$defs/name"',
            f"{place}/$ref",
        )


def _check_format(schema: Schema, place: Place) -> None:
    name = schema.get("format")
    if "format" not in schema:
        return
    types = schema.get("type", "string")
    if types != "string" and not (isinstance(types, list) and "string" in types):
        del schema["format"]  # formats restrict strings only
        return
    if name == "ipvanyaddress" and "anyOf" not in schema:
        schema["anyOf"] = [{"format": "ipv4"}, {"format": "ipv6"}]
        del schema["format"]
        return
    if isinstance(name, str) and name in _FREE_FORMATS:
        del schema["format"]
        return
    if not isinstance(name, str) or (name not in _FORMATS and name not in _PATTERNS):
        raise FormProblem(
            f"this format cannot be enforced: leave it out, or use one of {', '.join(sorted(_FORMATS))}",
            f"{place}/format",
        )
    if name in _PATTERNS:
        del schema["format"]
        _add_pattern(schema, _PATTERNS[name])


def _write_decimal(schema: Schema, place: Place) -> None:
    """Write pydantic's pattern of decimal numbers, "not only signs and dots, and ...", as two patterns."""
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and pattern.startswith(_NOT_ONLY_SIGNS) and "|" not in pattern:
        schema["pattern"] = "^" + pattern.removeprefix(_NOT_ONLY_SIGNS)
        _add_pattern(schema, "[^-+.]")


def _add_pattern(schema: Schema, pattern: str) -> None:
    if "pattern" not in schema:
        schema["pattern"] = pattern
    elif isinstance(others := schema.setdefault("allOf", []), list):
        others.append({"pattern": pattern})


def _check_constants(schema: Schema, place: Place) -> None:
    for key in ("const", "enum"):
        unseen = [schema[key]] if key in schema else []
        while unseen:
            value = unseen.pop()
            if isinstance(value, dict):
                unseen += value.values()
            elif isinstance(value, str):
                _check_characters(value, f"{place}/{key}")
            elif isinstance(value, list):
                unseen += value
            elif isinstance(value, int | float) and abs(value) > _EXACT:
                raise FormProblem(
                    "numbers above 2^53 are not exact in JSON: use smaller ones, or strings", f"{place}/{key}"
                )


def _check_characters(text: str, place: str) -> None:
    """Raise FormProblem for characters that llguidance leaves out of constants, though not of names."""
    if any((character < " " and character not in "\b\t\n\f\r") or character == "\x7f" for character in text):
        raise FormProblem("control characters that JSON writes as \\u00XX cannot be enforced", place)


def _check_size_of_object(schema: Schema, place: Place) -> None:
    least, required = schema.get("minProperties"), schema.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > len(set(map(str, required))) + 1:
        raise FormProblem(
            "that names differ cannot be enforced: leave it out, or list properties in `required`",
            f"{place}/minProperties",
        )


def _check_unique(schema: Schema, place: Place) -> None:
    most = schema.get("maxItems")
    if schema.get("uniqueItems") is False or (isinstance(most, int) and most <= 1):
        schema.pop("uniqueItems", None)


def _write_unevaluated(schema: Schema, place: Place) -> None:
    """Write unevaluated properties and items as additional ones, where nothing else evaluates any."""
    if any(key in schema for key in _APPLIED):
        return
    for key, same in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if key in schema and isinstance(schema.get(same, {}), dict | bool):
            value = schema.pop(key)
            schema.setdefault(same, value)


def _write_names(schema: Schema) -> None:
    """Write a schema for names of properties, if there are no others, as the properties themselves.

    Where that would repeat a large schema for many names, it is left as it is, and llguidance rejects it.
    """
    names = schema.get("propertyNames")
    if names is True:
        del schema["propertyNames"]
    if not isinstance(names, dict) or "properties" in schema or "patternProperties" in schema:
        return
    kinds = names.keys() - {"type", "title", "description"}
    if names.get("type", "string") != "string" or len(kinds) != 1:
        return
    value = schema.get("additionalProperties", True)
    kind = next(iter(kinds))
    named = names[kind]
    if kind == "pattern" and isinstance(named, str):
        schema["patternProperties"] = {named: value}
    elif kind == "format" and isinstance(named, str) and named in _PATTERNS:
        schema["patternProperties"] = {_PATTERNS[named]: value}
    elif kind == "enum" and isinstance(named, list) and all(map(_is_text, named)):
        if len(named) * len(json.dumps(value)) > _MOST_REPEATED:
            return
        schema["properties"] = dict.fromkeys(named, value)
    elif kind == "const" and isinstance(named, str):
        schema["properties"] = {named: value}
    else:
        return
    del schema["propertyNames"]
    schema["additionalProperties"] = False


def _copy_names(schema: Schema) -> None:
    """Replace references of `propertyNames` by what they refer to, so that `_write_names` can write it."""
    for _, each in list(subschemas(schema)):
        names = each.get("propertyNames")
        if isinstance(names, dict) and names.keys() - {"title", "description"} == {"$ref"}:
            target = resolved(schema, names["$ref"])
            if target is not None and isinstance(target[1], dict):
                each["propertyNames"] = dict(target[1])


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _bound_integers(schema: Schema, place: Place) -> None:
    types = schema.get("type")
    allowed = types if isinstance(types, list) else [types]
    if "integer" not in allowed or "number" in allowed or "const" in schema or "enum" in schema:
        return
    if "minimum" not in schema and "exclusiveMinimum" not in schema:
        schema["minimum"] = -_MOST_DIGITS
    if "maximum" not in schema and "exclusiveMaximum" not in schema:
        schema["maximum"] = _MOST_DIGITS


def _remove_options(schema: Schema, place: Place) -> None:
    schema.pop(_OPTIONS, None)


_PREPARATIONS: tuple[Callable[[Schema, Place], None], ...] = (
    _remove_options,
    _check_reference,
    _write_decimal,
    _check_format,
    _check_constants,
    _check_size_of_object,
    _check_unique,
    _write_unevaluated,
    _bound_integers,
)
