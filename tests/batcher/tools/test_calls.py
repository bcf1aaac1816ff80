"""Grammars of calls: what they allow is read back as valid calls, and other text stays free."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jsonschema
import llguidance.numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.batcher.text.detokenizer import Detokenizer, TextStream
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.batcher.tools.families import Family
from headrace.batcher.tools.form import AnswerForm
from headrace.batcher.tools.forms import form_of
from headrace.batcher.tools.parser import AnswerParser, Kind, Part
from headrace.grammars.compiling import Grammars
from headrace.grammars.vocabulary import Vocabulary
from headrace.v1 import generation_pb2 as pb

END = 256
SPECIALS = {"<|end|>": END} | {
    name: END + 1 + place
    for place, name in enumerate(
        ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"]
    )
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "get": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 5},
            "unit": {"enum": ["C", "F"]},
            "at": {"$ref": "#/$defs/at"},
        },
        "required": ["city", "at"],
        "additionalProperties": False,
        "$defs": {"at": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}},
    },
    "get_x": {"properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False},
    "now": {},
}
GET = '{"city": "Bonn", "at": [5, 6]}'
WRONG = '{"city": 5'
MODES = {"auto": pb.TOOL_MODE_AUTO, "required": pb.TOOL_MODE_REQUIRED}


class SpecialTokenizer(ByteTokenizer):
    """A tokenizer in which all markers are special tokens."""

    special_tokens: Mapping[str, int] = SPECIALS


@lru_cache
def grammars(special: bool) -> Grammars:
    names = SPECIALS if special else {"<|end|>": END}
    return Grammars(
        Vocabulary(
            [*(bytes([byte]) for byte in range(256)), *(b"" for _ in names)],
            specials=names,
            eos_ids=[END],
            encode=lambda text: list(text.encode()),
        )
    )


def request(mode: str = "auto", **options: Any) -> pb.GenerateRequest:
    asked = pb.GenerateRequest()
    asked.chat.messages.add(role="user", content="hi")
    for name, schema in SCHEMAS.items():
        asked.chat.tools.add(name=name, parameters=json.dumps(schema) if name != "now" else "")
    if mode in MODES:
        asked.chat.tool_choice.mode = MODES[mode]
    else:
        asked.chat.tool_choice.name = mode
    if "several" in options:
        asked.chat.parallel_tool_calls = options.pop("several")
    asked.sampling.MergeFrom(pb.Sampling(**options))
    return asked


def form(
    family: Family, asked: pb.GenerateRequest, *, special: bool = False, thinks: str = "off"
) -> AnswerForm:
    tokenizer = SpecialTokenizer if special else ByteTokenizer
    made = tokenizer(tool_format=family.value, reasoning="off" if thinks == "off" else "think")
    return form_of(asked, made, list(b"hi <think>\n" if thinks == "opened" else b"hi"))


def ids_of(text: str, form: AnswerForm) -> list[int]:
    """Return the tokens of a text, in which the names of the form's special tokens are these tokens."""
    ids: list[int] = []
    while text:
        id, name = next(
            ((id, name) for id, name in form.markers.items() if text.startswith(name)), (None, "")
        )
        ids += [id] if id is not None else list(text[0].encode())
        text = text[len(name) or 1 :]
    return ids


def allowed(form: AnswerForm, text: str, *, special: bool = False) -> str:
    """Return how far the grammar allows a text: "whole", "part" if more must follow, or the part before."""
    matcher = grammars(special).matcher(form.grammar)
    ids = ids_of(text, form)
    for place, id in enumerate(ids):
        if not matcher.consume_token(id):
            return repr(bytes(id for id in ids[:place] if id < END).decode(errors="replace"))
    return "whole" if matcher.is_accepting() else "part"


def walk(form: AnswerForm, begin: str, seed: int, *, special: bool = False) -> list[int]:
    """Return a random answer that begins with *begin*, without its end; short ones are likelier."""
    choose = random.Random(seed)
    matcher = grammars(special).matcher(form.grammar)
    ids = ids_of(begin, form)
    assert matcher.consume_tokens(ids), matcher.get_error()
    size = END + len(SPECIALS if special else {"<|end|>": END})
    mask = llguidance.numpy.allocate_token_bitmask(1, size)
    for step in range(600):
        llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
        options = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:size]).tolist()
        if END in options and (step > 100 or len(options) == 1 or choose.random() < 0.3):
            return ids
        ends = '"}],' if step < 200 else '"}]'  # a comma begins another call, which takes 50 steps
        closing = []
        if choose.random() < step / 100:
            closing = [id for id in options if id < END and chr(id) in ends]
        likely = [id for id in options if id != END and (id > END or chr(id) in '"{}[],:<>\n 12aC\\u00e9')]
        id = choose.choice(closing or likely or [id for id in options if id != END])
        assert matcher.consume_token(id)
        ids.append(id)
    raise AssertionError("the answer does not end")


def read(form: AnswerForm, ids: list[int]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return text, reasoning and calls of an answer."""
    stream = TextStream(Detokenizer(ByteTokenizer()), None, form.marker_texts)
    parser = AnswerParser(form)
    parts: list[Part] = []
    for id in ids:
        parts += parser.feed(stream.feed([id]).text)
    parts += [*parser.feed(stream.flush().text), *parser.finish()]
    text, reasoning = (
        "".join(part.source for part in parts if part.kind is kind) for kind in (Kind.TEXT, Kind.REASONING)
    )
    arguments = dict.fromkeys(range(sum(part.kind is Kind.CALL for part in parts)), "")
    for part in parts:
        if part.kind is Kind.ARGUMENTS:
            arguments[part.call] += part.source
    names = [part.name for part in parts if part.kind is Kind.CALL]
    return text, reasoning, list(zip(names, arguments.values(), strict=True))


def check(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        value = json.loads(arguments)
        assert isinstance(value, dict)
        jsonschema.validate(value, SCHEMAS[name])
        if name == "now":
            assert value == {}


def written(family: Family, special: bool, *arguments: str) -> str:
    """Return calls of `get` as models of the family write them, cut off behind the last arguments."""
    key = "parameters" if family is Family.LLAMA3 else "arguments"
    objects = [f'{{"name": "get", "{key}": {text}' for text in arguments]
    match family:
        case Family.HERMES:
            return "}\n</tool_call>\n".join(f"<tool_call>\n{call}" for call in objects)
        case Family.LLAMA3:
            return "}; ".join(objects)
        case Family.MISTRAL if special:
            return "".join(f"[TOOL_CALLS]get[ARGS]{text}" for text in arguments)
        case Family.MISTRAL:
            return "[TOOL_CALLS] [" + "}, ".join(objects)
        case Family.JSON:
            return "}\n".join(objects)


EVERY = pytest.mark.parametrize("family", Family)
BOTH = pytest.mark.parametrize("special", [False, True], ids=["text", "special tokens"])


@EVERY
@BOTH
@pytest.mark.parametrize("thinks", ["off", "may", "opened"])
@pytest.mark.parametrize("mode", ["required", "get", "auto"])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), several=st.booleans())
def test_any_allowed_answer_is_read_back_as_valid_calls(
    family: Family, special: bool, thinks: str, mode: str, seed: int, several: bool
) -> None:
    made = form(family, request(mode, several=several), special=special, thinks=thinks)
    begin = {"off": "", "may": "<think>well</think>\n\n", "opened": "well\n</think>"}[thinks]
    begun = begin + (written(family, special, "{") if mode == "auto" else "")

    text, reasoning, calls = read(made, walk(made, begun, seed, special=special))

    check(calls)
    assert len(calls) >= 1
    assert several or len(calls) == 1
    assert reasoning == (begin and "well")
    if mode == "get":
        assert [name for name, _ in calls] == ["get"]
    if mode != "auto":
        assert text == ""


@EVERY
@BOTH
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_several_calls_are_allowed_unless_the_request_excludes_them(
    family: Family, special: bool, mode: str
) -> None:
    made = form(family, request(mode), special=special)
    one = form(family, request(mode, several=False), special=special)
    text = written(family, special, GET, GET)

    assert allowed(made, text, special=special) in ("part", "whole")
    assert allowed(made, written(family, special, GET, WRONG), special=special) not in ("part", "whole")
    assert allowed(one, written(family, special, GET), special=special) in ("part", "whole")
    assert allowed(one, text, special=special) not in ("part", "whole")
    assert read(made, ids_of(text, made))[2] == [("get", GET)] * 2


@EVERY
@BOTH
@pytest.mark.parametrize("thinks", ["off", "may", "opened"])
@settings(max_examples=30)
@given(text=st.text(st.sampled_from('aé\n {}[]":,<>/|`') | st.characters(codec="utf-8"), max_size=30))
def test_ordinary_text_stays_free_and_may_end_anywhere(
    family: Family, special: bool, thinks: str, text: str
) -> None:
    made = form(family, request(), special=special, thinks=thinks)

    for begin in ("", {"off": "", "may": "<think>well</think>", "opened": "</think>"}[thinks]):
        assert allowed(made, begin + text, special=special) == "whole"


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("hermes", 'Look: <tool_call>\n{"name": "get", "arguments": {'),
        ("llama3", '\n{ "name" :"get", "parameters": {'),
        ("llama3", '<|python_tag|>{"name": "get", "parameters": {'),
        ("mistral", '[TOOL_CALLS][{"name": "get", "arguments": {'),
        ("json", '```json\n{"name": "get", "arguments": {'),
        ("json", '[\n  {"name": "get", "arguments": {'),
    ],
)
def test_a_call_that_begins_must_be_valid(family: str, text: str) -> None:
    """However it begins, as far as it would be read as a call."""
    made = form(Family(family), request())

    assert allowed(made, text) == "part"
    assert allowed(made, text + '"city": "Bonn"') == "part"
    assert allowed(made, text + '"city": 5') == repr(text + '"city": ')
    assert allowed(made, text.replace("get", "other")) in ("whole", repr(text[: text.index("get")]))


@pytest.mark.parametrize("family", ["llama3", "json"])
def test_a_call_after_thoughts_is_valid_however_much_white_space_is_between(family: str) -> None:
    made = form(Family(family), request(), thinks="opened")
    text = "well</think>" + "\n" * 100 + written(Family(family), False, WRONG)

    assert read(made, ids_of(text, made))[2] == [("get", WRONG)]
    assert allowed(made, text) == repr(text[:-1])


@EVERY
@BOTH
@pytest.mark.parametrize("thinks", ["off", "may", "opened"])
def test_an_answer_has_its_form_or_consists_of_calls(family: Family, special: bool, thinks: str) -> None:
    """Also if both are JSON objects that begin in the same way."""
    properties = {"name": {"type": "string"}, "age": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["name"], "additionalProperties": False}
    made = form(family, request(json_schema=json.dumps(schema)), special=special, thinks=thinks)
    begin = {"off": "", "may": "<think>x</think>\n", "opened": "x</think>"}[thinks]

    assert allowed(made, begin + '{"name": "get", "age": 5}', special=special) == "whole"
    assert allowed(made, begin + '{"name": "getter", "age": 5}', special=special) == "whole"
    assert allowed(made, begin + '{"name": "get", "age": "5"', special=special) not in ("whole", "part")
    assert allowed(made, begin + written(family, special, GET), special=special) in ("whole", "part")
    assert allowed(made, begin + "text", special=special) not in ("whole", "part")


@pytest.mark.parametrize("thinks", ["may", "opened"])
@BOTH
def test_a_form_without_tools_follows_the_thoughts(special: bool, thinks: str) -> None:
    asked = request(regex="[0-9]+")
    del asked.chat.tools[:]
    made = form(Family.JSON, asked, special=special, thinks=thinks)
    begin = "<think>any {thing}</think>\n\n" if thinks == "may" else "any {thing}</think>\n\n"

    assert allowed(made, begin + "42", special=special) == "whole"
    assert allowed(made, begin, special=special) == "part"
    assert allowed(made, begin + "4a", special=special) not in ("whole", "part")
    assert allowed(made, "42", special=special) == ("whole" if thinks == "may" else "part")


def test_text_may_stand_before_between_and_after_calls_that_have_an_end_of_their_own() -> None:
    made = form(Family.HERMES, request())
    call = f"{written(Family.HERMES, False, GET)}}}\n</tool_call>"

    assert allowed(made, f"Let me see. {call} And then: {call} Done.") == "whole"
    wrong = f"{call} And then: {written(Family.HERMES, False, WRONG)}"
    assert allowed(made, wrong) not in ("whole", "part"), "later calls are valid, too"
