"""Find schemas that no finite value can match, because each value would contain another one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import Any

from headrace.grammars.walking import Place, Schema, resolved, subschemas

_CHOICES = ("anyOf", "oneOf")


def first_endless(root: Schema) -> Place | None:
    """Return the place of the first schema that only endless values match; None if there is none.

    llguidance compiles such a schema to a grammar that reaches no end, or rejects it without a place.
    """
    found = list(subschemas(root))
    if not any("$ref" in schema for _, schema in found):
        return None
    unproven = {id(schema) for _, schema in found}  # those that are not known to end
    users: dict[int, list[Schema]] = {}  # by the schema that they need
    for _, schema in found:
        for part in chain(_needed(root, schema), *_options(schema)):
            users.setdefault(id(part), []).append(schema)
    # The least fixed point: a schema ends if what each of its values must contain is known to end.
    # First in, first out, and each once: a schema that needs thousands is not judged again for each of them.
    waiting = OrderedDict((id(schema), schema) for _, schema in reversed(found))
    while waiting:
        _, schema = waiting.popitem(last=False)
        if id(schema) in unproven and _ends(root, schema, unproven):
            unproven.discard(id(schema))
            waiting.update((id(user), user) for user in users.get(id(schema), []))
    return next((place for place, schema in found if id(schema) in unproven), None)


def _ends(root: Schema, schema: Schema, unproven: set[int]) -> bool:
    def known(part: Any) -> bool:
        return id(part) not in unproven  # also what is no schema, which is for llguidance to judge

    return all(map(known, _needed(root, schema))) and all(
        not options or any(map(known, options)) for options in _options(schema)
    )


def _options(schema: Schema) -> Iterator[list[Any]]:
    for key in _CHOICES:
        if isinstance(options := schema.get(key), list):
            yield options


def _needed(root: Schema, schema: Schema) -> Iterator[Any]:
    """Yield the schemas of which each value of *schema* has a value, or is one."""
    if "$ref" in schema and (target := resolved(root, schema["$ref"])) is not None:
        yield target[1]
    if isinstance(parts := schema.get("allOf"), list):
        yield from parts
    types = schema.get("type")
    kind = types[0] if isinstance(types, list) and len(types) == 1 else types
    if kind == "object" and isinstance(required := schema.get("required"), list):
        properties = schema.get("properties")
        if isinstance(properties, dict):
            yield from (properties[name] for name in required if isinstance(name, str) and name in properties)
    least = schema.get("minItems")
    if kind == "array" and isinstance(least, int) and least > 0:
        listed = schema.get("prefixItems")
        listed = listed if isinstance(listed, list) else []
        yield from listed[:least]
        if least > len(listed) and isinstance(items := schema.get("items"), dict):
            yield items
