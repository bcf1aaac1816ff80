"""The form of an answer follows from the request, its prompt and the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from headrace import errors
from headrace.batcher.text.tokens import THINK, ByteTokenizer
from headrace.batcher.tools.families import Family
from headrace.batcher.tools.form import FREE, AnswerForm
from headrace.batcher.tools.forms import form_of
from headrace.v1 import generation_pb2 as pb
from tests.harness import prompt

SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}}'


def asked(content: str = "hi", role: str = "user", **options: Any) -> pb.GenerateRequest:
    """Return a chat with two tools."""
    request = pb.GenerateRequest()
    request.chat.messages.add(role=role, content=content)
    request.chat.MergeFrom(pb.Chat(tools=[pb.Tool(name=name, parameters=SCHEMA) for name in "ab"], **options))
    return request


def form(request: pb.GenerateRequest, end: str = "", *, reasoning: str = "off", **options: Any) -> AnswerForm:
    """Return the form of an answer to a prompt that ends with *end*."""
    return form_of(request, ByteTokenizer(reasoning=reasoning, **options), list(f"prompt{end}".encode()))


def test_without_tools_and_forms_an_answer_is_free_unless_the_model_thinks() -> None:
    request = asked()
    del request.chat.tools[:]

    assert form(request) is FREE
    assert form(prompt("<think>"), "<think>", reasoning="think") is FREE, "raw text has no parts"
    assert form(request, reasoning="think") == AnswerForm(reasoning=THINK)


def test_a_choice_of_no_tool_leaves_calls_in_the_text() -> None:
    request = asked(tool_choice=pb.ToolChoice(mode=pb.TOOL_MODE_NONE))

    assert form(request) is FREE


@pytest.mark.parametrize(
    ("end", "thinking"),
    [
        ("", False),
        ("<think>\n", True),
        ("<think>", True),
        ("<think>\n\n</think>\n\n", None),
        ("<think> said the user<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_the_end_of_the_prompt_shows_whether_the_model_thinks(end: str, thinking: bool | None) -> None:
    """None: the template has closed the thoughts already, so that what follows is the answer."""
    made = form(asked(), end, reasoning="think")

    assert (made.reasoning, made.thinking) == (THINK if thinking is not None else None, thinking is True)


@pytest.mark.parametrize(
    ("content", "reasoning"),
    [("<think>so far", THINK), ("<think>x</think>The answer", None), ("The answer", None)],
)
def test_an_answer_that_continues_a_message_continues_its_last_part(
    content: str, reasoning: tuple[str, str] | None
) -> None:
    made = form(asked(content, "assistant", continue_final_message=True), content, reasoning="think")

    assert (made.reasoning, made.thinking) == (reasoning, reasoning is not None)


def test_only_tools_that_may_be_called_are_read() -> None:
    assert form(asked()).tools == {"a", "b"}
    assert form(asked(tool_choice=pb.ToolChoice(name="b"))).tools == {"b"}


def test_markers_that_are_special_tokens_are_named() -> None:
    class Special(ByteTokenizer):
        special_tokens: Mapping[str, int] = {"[TOOL_CALLS]": 300, "<tool_call>": 301, "</think>": 302}

    made = form_of(asked(), Special(tool_format="mistral", reasoning="think"), [1])

    assert made.family is Family.MISTRAL
    assert made.markers == {300: "[TOOL_CALLS]", 302: "</think>"}
    assert "<[300]>" in made.grammar


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ("{", ""),
        ("[]", ""),
        ('{"type": "array"}', " at /type"),
        ('{"type": ["null", "string"]}', " at /type"),
        ('{"type": "objects"}', " at /type"),
        ('{"type": 5}', " at /type"),
    ],
)
def test_parameters_that_are_no_schema_of_an_object_are_rejected_with_the_place(
    parameters: str, place: str
) -> None:
    request = asked()
    request.chat.tools[1].parameters = parameters

    with pytest.raises(errors.InvalidRequest, match=rf"^chat\.tools\[1\]\.parameters{place}: ") as rejected:
        form(request)

    assert rejected.value.field == "chat.tools[1].parameters"
    assert not isinstance(rejected.value, errors.InvalidSampling)


@pytest.mark.parametrize("parameters", ["", "{}", '{"type": ["object", "null"]}', '{"properties": {}}'])
def test_arguments_are_objects_whatever_the_schema_leaves_open(parameters: str) -> None:
    request = asked()
    del request.chat.tools[1:]
    request.chat.tools[0].parameters = parameters

    grammar = json.loads(form(request).grammar)

    (schema,) = (part["json_schema"] for part in grammar["grammars"] if "json_schema" in part)
    assert schema["type"] == "object"


@pytest.mark.parametrize(
    ("more", "closed"),
    [
        ({}, True),
        ({"additionalProperties": True}, False),
        ({"additionalProperties": {"type": "integer"}}, False),
        ({"patternProperties": {"^x-": {"type": "integer"}}}, False),
    ],
)
def test_arguments_have_the_properties_of_the_schema_only_unless_it_says_otherwise(
    more: dict[str, Any], closed: bool
) -> None:
    request = asked(tool_choice=pb.ToolChoice(name="a"))
    request.chat.tools[0].parameters = json.dumps({**json.loads(SCHEMA), **more})

    grammar = json.loads(form(request).grammar)["grammars"]
    (schema,) = [part["json_schema"] for part in grammar if "json_schema" in part]
    assert (schema.get("additionalProperties") is False) == closed


def test_a_choice_of_an_unknown_tool_is_rejected() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"one of chat\.tools") as rejected:
        form(asked(tool_choice=pb.ToolChoice(name="c")))

    assert rejected.value.field == "chat.tool_choice.name"


def test_a_form_that_is_no_grammar_is_rejected() -> None:
    request = prompt("x")
    request.sampling.json_schema = "{"

    with pytest.raises(errors.InvalidSampling, match=r"^sampling\.json_schema: ") as rejected:
        form(request)

    assert rejected.value.field == "sampling.json_schema"
