"""Decide the form of an answer: from a request, its prompt, and how its model writes calls and thoughts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from headrace import errors
from headrace.batcher.tools.calls import Calls, Thoughts, answer_grammar
from headrace.batcher.tools.families import Family
from headrace.batcher.tools.form import FREE, AnswerForm
from headrace.batcher.tools.formats import FORMATS
from headrace.grammars import forms
from headrace.grammars.problems import FormProblem
from headrace.v1 import generation_pb2 as pb

_NO_ARGUMENTS = '{"type": "object", "properties": {}, "additionalProperties": false}'
# The markers of thoughts, and white space, are within this many tokens at the end of a prompt, even if each
# byte is one.
_END = 32
_KEPT_CHARACTERS = 4096  # of schemas that are kept
# Keywords that say something about properties besides `properties`.
_OPEN = {
    *("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"),
    *("$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas"),
}


class Writer(Protocol):
    """What a tokenizer states of how its model writes; see `text.tokens.Tokenizer`."""

    tool_family: Family
    reasoning: tuple[str, str] | None

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Names and ids of the tokens that have no text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of *ids*, with the names of special tokens."""
        ...


def form_of(request: pb.GenerateRequest, tokenizer: Writer, prompt_ids: Sequence[int]) -> AnswerForm:
    """Return the form of the answer to *request*.

    Takes microseconds for requests without tools and forms. With them, time grows with their schemas: call it
    off the event loop. The grammar is not compiled. Raises InvalidSampling for a form, and InvalidRequest for
    a tool, that cannot be made into a grammar, with the field.
    """
    form = _form_part(request.sampling)
    if not request.HasField("chat"):
        return FREE if form is None else AnswerForm(form.text)
    calls = _calls(request.chat, tokenizer)
    thoughts = _thoughts(request.chat, tokenizer, prompt_ids)
    if form is None and calls is None and thoughts is None:
        return FREE
    style = FORMATS[calls.family] if calls is not None else None
    markers = [*((style.marker, *style.special) if style else ()), *(thoughts.markers if thoughts else ())]
    special = tokenizer.special_tokens
    return AnswerForm(
        grammar=answer_grammar(form, calls, thoughts, special),
        family=calls.family if calls is not None else None,
        tools=frozenset(name for name, _ in calls.tools) if calls is not None else frozenset(),
        reasoning=thoughts.markers if thoughts is not None else None,
        thinking=thoughts is not None and thoughts.opened,
        markers={special[name]: name for name in markers if name in special},
    )


def _form_part(sampling: pb.Sampling) -> forms.Part | None:
    """Return the grammar of `Sampling.structured`; None without one. Raises InvalidSampling."""
    field = sampling.WhichOneof("structured")
    try:
        match field:
            case "json_schema":
                return forms.json_schema_grammar(sampling.json_schema)
            case "json_object":
                return forms.json_object()
            case "regex":
                return forms.regex(sampling.regex)
            case "choices":
                return forms.choices(sampling.choices.texts)
            case "lark":
                return forms.lark(sampling.lark)
    except FormProblem as problem:
        raise errors.InvalidSampling(problem.about(f"sampling.{field}"), field=f"sampling.{field}") from None
    return None


def _calls(chat: pb.Chat, tokenizer: Writer) -> Calls | None:
    """Return the calls that the answer to a chat may contain."""
    choice = chat.tool_choice
    if not chat.tools or choice.mode == pb.TOOL_MODE_NONE:
        return None
    named = choice.WhichOneof("choice") == "name"
    tools = [
        (tool.name, _arguments(tool.parameters, f"chat.tools[{place}].parameters"))
        for place, tool in enumerate(chat.tools)
        if not named or tool.name == choice.name
    ]
    if not tools:
        raise errors.InvalidRequest(
            "chat.tool_choice.name must be the name of one of chat.tools", field="chat.tool_choice.name"
        )
    several = chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True
    return Calls(
        tokenizer.tool_family,
        tools,
        required=named or choice.mode == pb.TOOL_MODE_REQUIRED,
        several=several and not named,
    )


def _arguments(parameters: str, field: str) -> forms.Part:
    """Return the grammar of a tool's arguments. Raises InvalidRequest."""
    read = _known_object if len(parameters) <= _KEPT_CHARACTERS else _object
    try:
        return read(parameters or _NO_ARGUMENTS)
    except FormProblem as problem:
        raise errors.InvalidRequest(problem.about(field), field=field) from None


def _object(schema: str) -> forms.Part:
    """Return the grammar of objects that match a JSON schema, with its properties only. Raises FormProblem.

    A schema that does not mention further properties allows any, but no tool expects them, and small models
    make them up.
    """
    part = forms.json_schema_grammar(schema)
    read = json.loads(schema)
    kinds = read.get("type", ["object"])
    if kinds != "object" and (not isinstance(kinds, list) or "object" not in kinds):
        raise FormProblem('must be "object", because arguments are an object', "/type")
    stricter = {**read, "type": "object"}
    if "properties" in read and not _OPEN & read.keys():
        stricter["additionalProperties"] = False
    if stricter == read:
        return part
    return forms.json_schema_grammar(json.dumps(stricter, ensure_ascii=False, separators=(",", ":")))


# The turns of a conversation have the same tools: 128 of them take 25 ms to read.
_known_object = lru_cache(maxsize=512)(_object)


def _thoughts(chat: pb.Chat, tokenizer: Writer, prompt_ids: Sequence[int]) -> Thoughts | None:
    """Return the thoughts with which the answer may begin."""
    if tokenizer.reasoning is None:
        return None
    opener, closer = tokenizer.reasoning
    if chat.continue_final_message and (begun := chat.messages[-1].content):
        # What follows continues the thoughts, or the text.
        return Thoughts(tokenizer.reasoning, True) if begun.rfind(opener) > begun.rfind(closer) else None
    end = tokenizer.decode(prompt_ids[-_END:]).rstrip()
    if end.endswith(closer):  # the template has closed them: the model is not to think
        return None
    return Thoughts(tokenizer.reasoning, opened=end.endswith(opener))
