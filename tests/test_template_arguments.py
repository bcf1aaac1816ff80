"""Variables for chat templates are bounded, and no caller replaces what the server sets itself."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from google.protobuf import json_format, struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.client import chat
from headrace.template_arguments import (
    MAX_BYTES,
    MAX_DEPTH,
    RESERVED,
    arguments_of,
    check_arguments,
    read_arguments,
    texts_in,
    with_texts,
)
from headrace.validation import check_request

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc<", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["enable_thinking", "effort", "x_1", "größe"]), JSON, max_size=3)


def struct(**values: Any) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(values)
    return made


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


def number(value: float) -> struct_pb2.Struct:
    return struct_pb2.Struct(fields={"x": struct_pb2.Value(number_value=value)})


@given(arguments=ARGUMENTS)
def test_a_message_and_a_setting_give_a_template_the_same_values(arguments: dict[str, Any]) -> None:
    """Of the same types and in the same order: a template may add 1 to a number, or write an object."""
    message = json_format.ParseDict(arguments, struct_pb2.Struct())
    check_arguments(message)

    assert arguments_of(message) == read_arguments(json.dumps(arguments)) == arguments
    assert json.dumps(arguments_of(message)) == json.dumps(read_arguments(json.dumps(arguments)))


def test_a_template_gets_whole_numbers_as_integers_and_the_names_of_each_object_in_order() -> None:
    """A map of a message has another order in each process, but all batchers must render the same prompt."""
    names = [f"name_{number:02}" for number in range(40)]
    shuffled = random.Random(1).sample(names, len(names))
    arguments = struct(n=3, half=0.5, inner=[dict.fromkeys(shuffled, 2.0**60)])

    assert json.dumps(arguments_of(arguments)) == json.dumps(
        {"half": 0.5, "inner": [dict.fromkeys(names, 2.0**60)], "n": 3}
    )
    assert list(read_arguments(json.dumps({"x": dict.fromkeys(shuffled, 1)}))["x"]) == names


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        *((struct(**{name: 1}), f"sets '{name}'") for name in sorted(RESERVED)),
        *((struct(**{name: 1}), "names consist of") for name in ("", "a b", "1st", "a-b", "a.b")),
        (struct(x="y" * MAX_BYTES), f"at most {MAX_BYTES}"),
        (struct(x=nested(MAX_DEPTH)), f"more than {MAX_DEPTH}"),
        (number(math.nan), "not a JSON number"),
        (number(-math.inf), "not a JSON number"),
        (struct_pb2.Struct(fields={"x": struct_pb2.Value()}), "no kind"),
        (struct(x=[{"y": None}]), None),
        (struct(x=nested(MAX_DEPTH - 1)), None),
    ],
)
def test_arguments_that_no_template_may_have_are_rejected_in_words(
    arguments: struct_pb2.Struct, complaint: str | None
) -> None:
    request = chat("hi")
    request.chat.template_arguments.CopyFrom(arguments)
    if complaint is None:
        check_request(request)
        return
    with pytest.raises(errors.InvalidRequest, match=complaint) as caught:
        check_request(request)

    assert caught.value.field == "chat.template_arguments"
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("enable_thinking=false", "not a JSON object"),
        ('{"x": NaN}', "NaN"),
        ('{"x": 1e999}', "not a JSON number"),
        ('{"x": ' + "9" * 400 + "}", "too large"),
        ('{"messages": []}', "sets 'messages'"),
        ("[" * 100_000, "in each other"),
        ('{"x": ' + "[" * 40 + "]" * 40 + "}", f"more than {MAX_DEPTH}"),
        ('{"a b": 1}', "names consist of"),
    ],
)
def test_a_setting_that_is_no_set_of_arguments_is_rejected_in_words(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        read_arguments(text)

    assert len(str(caught.value)) < 300


@given(arguments=ARGUMENTS)
def test_each_text_of_the_arguments_is_found_and_changed_but_no_variable_is_renamed(
    arguments: dict[str, Any],
) -> None:
    changed = with_texts(arguments, lambda text: text + "!")

    assert [text + "!" for text in texts_in(arguments)] == list(texts_in(changed))
    assert changed.keys() == arguments.keys()
    assert with_texts(changed, lambda text: text[:-1]) == arguments
