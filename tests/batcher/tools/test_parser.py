"""The parts of an answer depend on its text alone, not on the pieces in which it comes, and lose nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.batcher.tools.families import Family
from headrace.batcher.tools.form import AnswerForm
from headrace.batcher.tools.parser import AnswerParser, Kind, Part

TOOLS = frozenset({"get", "get_x"})
THINK = ("<think>", "</think>")
ARGUMENTS = '{"city": "Pa\\"r}is", "n": [{"a": 1}]}'
CALL = f'{{"name": "get", "arguments": {ARGUMENTS}}}'
LLAMA_CALL = CALL.replace("arguments", "parameters")
FORMS = {
    f"{family.value} {thinking}": AnswerForm(
        family=family, tools=TOOLS, reasoning=THINK if thinking else None, thinking=thinking == "opened"
    )
    for family in Family
    for thinking in ("", "may think", "opened")
} | {"thoughts only": AnswerForm(reasoning=THINK)}
# Markup and text in any order: complete calls are rare among them, almost complete ones are not.
PIECES = st.sampled_from(
    [
        *["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", *THINK],
        *[CALL, LLAMA_CALL, '{"name": "get"', '{"name" :\n"get_x"', '{"name": "other"', ', "arguments": {'],
        *[', "parameters": {', '"a": "\\', '"', "{", "}", "[", "]", ",", ";", " ", "\n", " " * 20, "\n" * 40],
        *["```json\n", "```", "Paris", "<", "é", ', "id": "abc123XYZ"}', "<tool", "[TOOL", "get", "{}"],
    ]
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)
SPACE = " \t\r\n"


def parts(form: AnswerForm, *pieces: str, end: bool = True) -> list[Part]:
    """Return the parts of a text, those of the same kind in a row as one."""
    parser = AnswerParser(form)
    found = [part for piece in pieces for part in parser.feed(piece)]
    return joined([*found, *(parser.finish() if end else [])])


def joined(found: Sequence[Part]) -> list[Part]:
    whole: list[Part] = []
    for part in found:
        if whole and part.kind is not Kind.CALL and part[0::2] == whole[-1][0::2]:
            whole[-1] = whole[-1]._replace(source=whole[-1].source + part.source)
        else:
            whole.append(part)
    return whole


def content(form: AnswerForm, text: str) -> list[tuple[str, str]]:
    """Return the parts of a text without markup: kind, and text or name."""
    return [
        (part.kind.value, part.name or part.source) for part in parts(form, text) if part.kind != Kind.MARKUP
    ]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@settings(max_examples=40)
@given(text=TEXTS)
def test_what_is_released_depends_on_the_text_so_far_alone(form: AnswerForm, text: str) -> None:
    """An answer that is resumed anywhere continues with the next character of the same part."""
    parser = AnswerParser(form)
    released: list[Part] = []
    for end, letter in enumerate(text, 1):
        released += parser.feed(letter)
        assert joined(released) == parts(form, text[:end], end=False)

    assert joined([*released, *parser.finish()]) == parts(form, text)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(text=TEXTS, data=st.data())
def test_pieces_of_any_length_give_the_same_parts(form: AnswerForm, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    assert parts(form, *pieces) == parts(form, text)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(text=TEXTS)
def test_the_sources_of_all_parts_are_the_whole_text(form: AnswerForm, text: str) -> None:
    found = parts(form, text)

    assert "".join(part.source for part in found) == text
    calls = [part for part in found if part.kind is Kind.CALL]
    assert [part.call for part in calls] == list(range(len(calls)))
    assert {part.name for part in calls} <= TOOLS


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@settings(max_examples=20)
@given(text=TEXTS)
def test_no_more_than_the_beginning_of_a_call_is_held_back(form: AnswerForm, text: str) -> None:
    """A bounded number of characters, so that the work for each does not grow with the answer."""
    parser = AnswerParser(form)

    released = "".join(part.source for letter in text * 20 for part in parser.feed(letter))

    assert len(text * 20) - len(released) < 500


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(text=st.text(st.sampled_from("aé. \n"), min_size=1))
def test_ordinary_text_is_released_but_for_white_space(form: AnswerForm, text: str) -> None:
    found = parts(form, text, end=False)

    assert "".join(part.source for part in found).rstrip(SPACE) == text.rstrip(SPACE)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("text", ["a" + "\n" * 1000, "<think>a" + " " * 1000, f"{CALL}" + "\n" * 1000])
def test_much_white_space_is_released_before_its_end(form: AnswerForm, text: str) -> None:
    released = "".join(part.source for part in parts(form, text, end=False))

    assert len(text) - len(released) <= 32


def test_a_call_of_no_tool_is_released_as_soon_as_that_is_known() -> None:
    text = 'a <tool_call>\n{"name": "other", "arguments": {'

    released = parts(FORMS["hermes "], text, end=False)

    assert released == [Part(Kind.TEXT, text)]


CALLED = [("call", "get"), ("arguments", ARGUMENTS)]


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", CALLED),
        ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", CALLED * 2),
        ("hermes", f"Let me see.\n\n<tool_call>\n{CALL}\n</tool_call>\n", [("text", "Let me see."), *CALLED]),
        ("hermes", f"<tool_call>{CALL}</tool_call> Done.", [*CALLED, ("text", "Done.")]),
        ("hermes", f"<tool_call>{CALL}", CALLED),
        ("hermes", f"<tool_call>{CALL[:-9]}", [CALLED[0], ("arguments", ARGUMENTS[:-8])]),
        ("hermes", f"<tool_call>{CALL}</tool_c", CALLED),
        ("hermes", "a < b", [("text", "a < b")]),
        ("hermes", CALL, CALLED),
        ("hermes", f"```json\n{CALL}\n```", CALLED),
        ("hermes", f"{CALL}\n{CALL}", CALLED * 2),
        ("hermes", f"I call: {CALL}", [("text", f"I call: {CALL}")]),
        ("llama3", LLAMA_CALL, CALLED),
        ("llama3", f"\n<|python_tag|>{LLAMA_CALL}; {LLAMA_CALL}\n{LLAMA_CALL}", CALLED * 3),
        ("llama3", f"I call: <|python_tag|>{LLAMA_CALL}", [("text", "I call:"), *CALLED]),
        ("llama3", f"I call: {LLAMA_CALL}", [("text", f"I call: {LLAMA_CALL}")]),
        ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", CALLED * 2),
        ("mistral", f'Well.[TOOL_CALLS][{CALL[:-1]}, "id": "abc123XYZ"}}]', [("text", "Well."), *CALLED]),
        ("mistral", f"[TOOL_CALLS]get[ARGS]{ARGUMENTS}[TOOL_CALLS]get[ARGS]{ARGUMENTS}", CALLED * 2),
        ("json", CALL, CALLED),
        ("json", f"```json\n{CALL}\n```", CALLED),
        ("json", f"```\n[{CALL},\n{CALL}]\n```\n", CALLED * 2),
        ("json", f"{CALL}\n{CALL}", CALLED * 2),
        ("json", f"{CALL} That is all.", [*CALLED, ("text", "That is all.")]),
        ("json", '{"name": "Bob"}', [("text", '{"name": "Bob"}')]),
    ],
)
def test_calls_in_the_format_of_a_family(family: str, text: str, expected: list[tuple[str, str]]) -> None:
    assert content(AnswerForm(family=Family(family), tools=TOOLS), text) == expected


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "unknown", "arguments": {}}',
        '{"name": "get"}',
        '{"name": "get", "arguments": "x"}',
        '{"name": "get", "arguments"',
        '{"name": get, "arguments": {}}',
        '{"arguments": {}, "name": "get"}',
        f'{{"name": "{"x" * 65}", "arguments": {{}}}}',
        f'{{"name":{" " * 33}"get", "arguments": {{}}}}',
        "",
    ],
)
@pytest.mark.parametrize(
    "written", ["<tool_call>{}</tool_call>", "[TOOL_CALLS] [{}]", "<|python_tag|>{}", "{}"]
)
def test_what_is_no_call_after_all_is_text(written: str, call: str) -> None:
    text = written.replace("{}", call, 1)

    for family in Family:
        assert content(AnswerForm(family=family, tools=TOOLS), text) == ([("text", text)] if text else [])


def test_arguments_are_released_as_they_come() -> None:
    parser = AnswerParser(AnswerForm(family=Family.HERMES, tools=TOOLS))
    parser.feed('<tool_call>\n{"name": "get", "arguments": ')

    released = ["".join(part.source for part in parser.feed(letter)) for letter in ARGUMENTS]

    assert released[1:] == list(ARGUMENTS[1:])


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("may think", "<think>\nWell.\n</think>\n\nYes.", [("reasoning", "Well."), ("text", "Yes.")]),
        ("may think", "Yes. <think>no</think>", [("text", "Yes. <think>no</think>")]),
        ("may think", "\n<think>never closed\n", [("reasoning", "never closed\n")]),
        ("may think", "<think>\n\n</think>\n\nYes.", [("text", "Yes.")]),
        ("opened", "\nWell.</think>Yes.", [("reasoning", "Well."), ("text", "Yes.")]),
        ("opened", "<think>Well.</think>Yes.", [("reasoning", "Well."), ("text", "Yes.")]),
        ("opened", "Well.\n\nI see <b", [("reasoning", "Well.\n\nI see <b")]),
        ("opened", f"<tool_call>{CALL}</think>", [("reasoning", f"<tool_call>{CALL}")]),
    ],
)
def test_thoughts_come_first_and_contain_no_calls(
    form: str, text: str, expected: list[tuple[str, str]]
) -> None:
    assert content(FORMS[f"hermes {form}"], text) == expected
    called = f"{text}</think><tool_call>{CALL}</tool_call>"
    assert content(FORMS["hermes opened"], called)[-2:] == CALLED


SPECIAL = AnswerForm(
    family=Family.MISTRAL,
    tools=TOOLS,
    reasoning=THINK,
    markers={1: "[TOOL_CALLS]", 2: "[ARGS]", 3: "</think>"},
)


def test_a_marker_that_is_a_special_token_is_no_text_anywhere() -> None:
    calls, args, closer = SPECIAL.marker_texts.values()

    assert content(SPECIAL, f"a{calls}b{args}c{closer}d") == [
        ("text", "a"),
        ("text", "b"),
        ("text", "c"),
        ("text", "d"),
    ]


def test_the_name_of_a_special_token_in_ordinary_text_is_no_marker() -> None:
    """It has no grammar, and would be dropped or not, depending on the pieces in which it comes."""
    text = f"a[ARGS]b</think>[TOOL_CALLS] [{CALL}]"

    assert content(SPECIAL, text) == [("text", text)]
