"""Read the parameters of a request, and describe what is wrong with it in words.

A parameter is supported (a field of its class), ignored (the response's header `x-headrace-ignored` names
it), or refused, because an answer that ignores it would be wrong. A parameter that no class knows is ignored,
because SDKs send new ones before servers know them. docs/openai.md lists all others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from headrace.gateway.problems import Problem
from headrace.quoting import MAX_QUOTED, quoted

IGNORED_HEADER = "x-headrace-ignored"
MAX_IGNORED = 16  # names in the header
MAX_NAME = 256  # characters of the name of a field in an error

P = TypeVar("P", bound="Parameters")

_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")


@dataclass(frozen=True)
class Refusal:
    """A parameter that is refused, unless its value requests nothing.

    harmless   the values that request nothing, besides null
    advice     what to do instead
    """

    advice: str
    harmless: Collection[object] = ()

    def applies(self, value: object) -> bool:
        """Return whether *value* requests something."""
        # 0 == False, and 1 == True: values of different types are different here.
        return value is not None and not any(
            type(value) is type(other) and value == other for other in self.harmless
        )


class Parameters(BaseModel):
    """The parameters of a request, or of a part of it. Numbers in strings are not numbers.

    refused   the parameters that are refused
    ignored   those that are ignored, in addition to unknown ones
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    _large: bool = PrivateAttr(default=False)

    refused: ClassVar[Mapping[str, Refusal]] = {}
    ignored: ClassVar[Collection[str]] = ()

    def unused(self, place: str = "") -> list[str]:
        """Return the names of the parameters that are ignored. Raises Problem for one that is refused.

        place   prepended to the names, such as "stream_options."
        """
        return unused_of((self.model_extra or {}).items(), self.refused, place)

    @property
    def large(self) -> bool:
        """Whether they come from a large body: then sizes are checked before values are copied."""
        return self._large

    def release(self, *fields: str) -> None:
        """Free the memory of parameters that are not supported, and of *fields*, which are not read again.

        Small JSON objects take up to 30 times as many bytes as their text, and an answer takes minutes.
        """
        if self.model_extra:
            self.model_extra.clear()
        for name in fields:
            setattr(self, name, None)


def unused_of(
    others: Iterable[tuple[str, object]], refused: Mapping[str, Refusal], place: str = ""
) -> list[str]:
    """Return the names of those that are ignored of parameters that are not supported; null is as if absent.

    place   prepended to the names, such as "stream_options."

    Raises Problem for the first one that is refused.
    """
    names = []
    for name, value in others:
        refusal = refused.get(name)
        if refusal is None:
            if value is not None:
                names.append(place + name)
        elif refusal.applies(value):
            raise Problem(
                400,
                f"{place}{name} is not supported: {refusal.advice}",
                code="unsupported_parameter",
                param=place + name,
            )
    return names


def read(kind: type[P], body: Mapping[str, object], *, large: bool = False) -> P:
    """Return the parameters in the JSON object *body*. Raises Problem for the first thing that is wrong.

    large   whether the body is, see `Parameters.large`
    """
    try:
        parameters = kind.model_validate(body)
    except ValidationError as error:
        raise _problem(error) from None
    parameters._large = large
    return parameters


def invalid(name: str, complaint: str) -> Problem:
    """Return the problem of a parameter with a value that is not possible."""
    return Problem(400, f"{name} {complaint}", code="invalid_value", param=name)


def ignored_header(names: Collection[str]) -> dict[str, str]:
    """Return the response header that names ignored parameters; none without names.

    Callers choose the names: other characters than those of names are replaced, and their number is limited.
    """
    if not names:
        return {}
    different = list(dict.fromkeys(names))
    shown = [_UNSAFE.sub("?", name[:64]) for name in different[:MAX_IGNORED]]
    if len(different) > MAX_IGNORED:
        shown.append("...")
    return {IGNORED_HEADER: ", ".join(shown)}


def _problem(error: ValidationError) -> Problem:
    found = error.errors(include_url=False)
    first = _clearest(found)
    name = _name(first["loc"])
    if first["type"] == "missing":
        return Problem(400, f"{name} is missing: set it", code="missing_required_parameter", param=name)
    wanted = [_TYPES[other["type"]] for other in found if _same(other, first)]
    if wanted:
        complaint = f"is {_shown(first['input'])}, must be {' or '.join(dict.fromkeys(wanted))}"
    else:
        complaint = _complaint(first)
    return invalid(name, complaint)


def _clearest(found: list[ErrorDetails]) -> ErrorDetails:
    """Return the error to report of those of the first field.

    A union has errors for each of its alternatives. That of the right type goes deepest, or is not about the
    type.
    """
    field = found[0]["loc"][:1]
    return max(
        (error for error in found if error["loc"][:1] == field),
        key=lambda error: (len(error["loc"]), error["type"] not in _TYPES),
    )


def _same(error: ErrorDetails, first: ErrorDetails) -> bool:
    """Return whether both are about the type of the same value, which has several possible types."""
    return error["type"] in _TYPES and first["type"] in _TYPES and _name(error["loc"]) == _name(first["loc"])


def _name(location: tuple[int | str, ...]) -> str:
    """Return the name of the field at fault, such as messages[0].content."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not _ALTERNATIVE.fullmatch(part):
            name += f".{part}" if name else part
    return name[:MAX_NAME]


_ALTERNATIVE = re.compile(r"str|int|(list|dict)\[.*\]")  # the names of a union's alternatives in a location
_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _complaint(error: ErrorDetails) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "value_error":  # of a validator in this package
        return str(context["error"])
    if kind == "literal_error":
        return f"is {_shown(value)}, must be {context['expected']}"
    if kind == "greater_than_equal":
        return f"is {_shown(value)}, must be at least {context['ge']}"
    if kind == "less_than_equal":
        return f"is {_shown(value)}, must be at most {context['le']}"
    if kind == "too_long":
        return f"has more than {context['max_length']} elements: remove some"
    if kind == "too_short":
        return "is empty: add at least one element"
    if kind == "string_too_long":
        return f"has more than {context['max_length']} characters: shorten it"
    return f"is {_shown(value)}: {error['msg']}"


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = str(value)
    return quoted(text) if isinstance(value, str) or len(text) > MAX_QUOTED else text
