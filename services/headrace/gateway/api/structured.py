"""Read the form that an answer must have: `response_format` of OpenAI's API, and vLLM's parameters for it.

Only one of them can be set. All become one field of `Sampling.structured`; what it may contain is checked by
`headrace.validation`, and whether it can be enforced by the batcher.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from headrace.gateway.api.bounded import bounded_json
from headrace.gateway.api.reading import Parameters, Refusal, invalid
from headrace.gateway.problems import Problem
from headrace.structured import MAX_CHOICES, MAX_SCHEMA_BYTES
from headrace.v1 import generation_pb2 as pb

Schema = dict[str, object]
Choices = Annotated[list[str], Field(max_length=MAX_CHOICES, fail_fast=True)]


class JsonSchema(Parameters):
    """A schema and its name. It is enforced, whatever `strict` is."""

    ignored: ClassVar[Collection[str]] = ("description",)

    name: str | None = None
    json_schema: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Parameters):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def unused(self, place: str = "") -> list[str]:
        """Return the names of the parameters that are ignored. Raises Problem for one that is refused."""
        inner = [] if self.json_schema is None else self.json_schema.unused(f"{place}json_schema.")
        return super().unused(place) + inner


class StructuredOutputs(Parameters):
    """vLLM's `structured_outputs`."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "disable_additional_properties": Refusal("set additionalProperties to false in the schema", (False,)),
        "structural_tag": Refusal("use tools, or grammar"),
        "whitespace_pattern": Refusal("leave it out, or use grammar"),
    }
    ignored: ClassVar[Collection[str]] = ("disable_any_whitespace",)

    json_schema: Annotated[str | Schema | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None


@dataclass(frozen=True)
class Form:
    """The form of an answer.

    name    of the parameter that sets it
    field   of `Sampling.structured`
    value   of that field; a schema also as an object
    """

    name: str
    field: Literal["json_schema", "json_object", "regex", "choices", "lark"]
    value: str | bool | list[str] | Schema

    def set_in(self, sampling: pb.Sampling, *, large: bool) -> None:
        """Set the field. Raises Problem for a schema that is too large; see `bounded_json`."""
        value = self.value
        if isinstance(value, list):
            sampling.choices.SetInParent()
            sampling.choices.texts.extend(value)
        elif isinstance(value, dict):
            sampling.json_schema = bounded_json(value, self.name, MAX_SCHEMA_BYTES, large=large)
        else:
            setattr(sampling, self.field, value)


class FormParameters(Parameters):
    """The parameters that set the form of an answer."""

    response_format: ResponseFormat | None = None
    # vLLM's
    structured_outputs: StructuredOutputs | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_json: str | Schema | None = None
    guided_regex: str | None = None

    def unused(self, place: str = "") -> list[str]:
        """Return the names of the parameters that are ignored. Raises Problem for one that is refused."""
        names = super().unused(place)
        for name in ("response_format", "structured_outputs"):
            inner: Parameters | None = getattr(self, name)
            if inner is not None:
                names += inner.unused(f"{place}{name}.")
        return names

    def release(self, *fields: str) -> None:
        """Free the memory of parameters that are not supported, of these, and of *fields*."""
        super().release(*FormParameters.model_fields, *fields)

    def form(self) -> Form | None:
        """Return the form that is requested; None: any. Raises Problem for several."""
        forms = list(self._forms())
        if len(forms) > 1:
            raise invalid(forms[1].name, f"is set together with {forms[0].name}: an answer has one form")
        return forms[0] if forms else None

    def _forms(self) -> Iterator[Form]:
        if (format := self.response_format) is not None:
            if format.type == "json_schema":
                yield Form("response_format.json_schema.schema", "json_schema", _schema_of(format))
            elif format.type == "json_object":
                yield Form("response_format", "json_object", True)
        if (outputs := self.structured_outputs) is not None:
            yield from _outputs_of(outputs)
        if self.guided_choice is not None:
            yield Form("guided_choice", "choices", self.guided_choice)
        if self.guided_grammar is not None:
            yield Form("guided_grammar", "lark", self.guided_grammar)
        if self.guided_json is not None:
            yield Form("guided_json", "json_schema", self.guided_json)
        if self.guided_regex is not None:
            yield Form("guided_regex", "regex", self.guided_regex)


def _outputs_of(outputs: StructuredOutputs) -> Iterator[Form]:
    if outputs.json_schema is not None:
        yield Form("structured_outputs.json", "json_schema", outputs.json_schema)
    if outputs.json_object:
        yield Form("structured_outputs.json_object", "json_object", True)
    if outputs.regex is not None:
        yield Form("structured_outputs.regex", "regex", outputs.regex)
    if outputs.choice is not None:
        yield Form("structured_outputs.choice", "choices", outputs.choice)
    if outputs.grammar is not None:
        yield Form("structured_outputs.grammar", "lark", outputs.grammar)


def _schema_of(format: ResponseFormat) -> Schema:
    place, inner = "response_format.json_schema", format.json_schema
    if inner is None:
        raise _missing(place, "the schema of the answer, and its name")
    if inner.json_schema is None:
        raise _missing(f"{place}.schema", "the schema of the answer")
    return inner.json_schema


def _missing(name: str, what: str) -> Problem:
    return Problem(400, f"{name} is missing: set {what}", code="missing_required_parameter", param=name)
