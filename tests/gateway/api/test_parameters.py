"""Each parameter of a request does what docs/openai.md says: it is supported, ignored or refused.

Each row of the tables there has a row here, and each row here is checked on a running gateway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headrace.gateway.api.chat import messages
from headrace.gateway.api.chat.parameters import ChatParameters
from headrace.gateway.api.parameters import CompletionParameters
from headrace.gateway.api.reading import Parameters, Refusal, read
from headrace.gateway.api.text.parameters import TextParameters
from headrace.gateway.problems import Problem
from headrace.v1 import generation_pb2 as pb
from tests.gateway.fake_router import TEXT, Edge

PAGE = (Path(__file__).parents[3] / "docs" / "openai.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (\w+)? ?", re.MULTILINE)


def rows_of(heading: str) -> list[tuple[str, str, str]]:
    """Return the first three columns of the table under a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return ROW.findall(section)


CHAT = {name: kind for name, kind, _ in rows_of("Parameters")}
TEXT_COMPLETIONS = {name: kind for name, _, kind in rows_of("Parameters")}


def kinds_of(supported: Iterable[str], ignored: Iterable[str], refused: Iterable[str]) -> dict[str, str]:
    """Return the kinds of parameters, by name."""
    kinds = dict.fromkeys(supported, "supported") | dict.fromkeys(ignored, "ignored")
    return kinds | dict.fromkeys(refused, "refused")


@pytest.mark.parametrize(("kind", "table"), [(ChatParameters, CHAT), (TextParameters, TEXT_COMPLETIONS)])
def test_the_table_of_parameters_is_that_of_the_code(kind: type[Parameters], table: dict[str, str]) -> None:
    kinds = kinds_of(kind.model_fields, kind.ignored, kind.refused)

    # One that only the other path has is unknown here, and thus ignored.
    assert table == dict.fromkeys(table, "ignored") | kinds


def test_the_table_of_messages_is_that_of_the_code() -> None:
    fields = messages.Message.__annotations__
    table = {name: kind for name, kind, _ in rows_of("Messages")}

    assert table == kinds_of(fields, (), messages.REFUSED)


def test_every_row_of_the_table_is_tested_below() -> None:
    tested = {name: kind for kind, rows in TESTED.items() for name in rows}

    assert dict.fromkeys(CHAT, "ignored") | tested == CHAT
    assert {name for name, kind in TEXT_COMPLETIONS.items() if kind != "ignored"} == {
        *(CompletionParameters.model_fields.keys() & SUPPORTED.keys()),
        *(CompletionParameters.refused.keys() & REFUSED.keys()),
        *TEXT_REFUSED,
        *("best_of", "echo", "logprobs", "prompt"),  # in the tests of text completions
    }


# Values of text completions alone that are refused, and those that request nothing.
TEXT_REFUSED: dict[str, tuple[Any, ...]] = {
    "prompt_embeds": ("AAAA",),
    "prompt_logprobs": (1,),
    "suffix": ("x", ""),
}


@pytest.mark.parametrize("name", [*TEXT_REFUSED, *CompletionParameters.refused])
def test_text_completions_refuse_what_chat_refuses_and_their_own(name: str) -> None:
    value, *harmless = TEXT_REFUSED.get(name) or REFUSED[name]
    if name == "add_special_tokens":
        value, harmless = False, [True]

    with pytest.raises(Problem) as raised:
        read(TextParameters, {"prompt": "a", name: value}).unused()

    assert raised.value.param == name
    assert [read(TextParameters, {"prompt": "a", name: other}).unused() for other in harmless] == [
        [] for _ in harmless
    ]


@pytest.mark.parametrize("name", CompletionParameters.ignored)
def test_text_completions_ignore_what_chat_ignores(name: str) -> None:
    assert read(TextParameters, {"prompt": "a", name: IGNORED[name]}).unused() == [name]


@dataclass(frozen=True)
class Set:
    """A supported parameter: a value, and what the mesh receives, as text of the message's fields.

    asked   the expected fields of the request
    with_   other parameters of the request
    """

    value: Any
    asked: Mapping[str, Any]
    with_: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A supported parameter that changes the response only: a path in it, and the expected value."""

    value: Any
    path: tuple[str | int, ...]
    expected: Any
    with_: Mapping[str, Any] = field(default_factory=dict)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CHOICE = ("choices", 0)
SUPPORTED: dict[str, Set | Reply] = {
    "add_generation_prompt": Set(True, {"chat.continue_final_message": False}),
    "chat_template_kwargs": Set(
        {"enable_thinking": False, "budget": 5},
        {"chat.template_arguments": {"enable_thinking": False, "budget": 5.0}},
    ),
    "continue_final_message": Set(
        True,
        {"chat.continue_final_message": True, "chat.messages.1.content": "Sure"},
        {"messages": [user("Hi"), {"role": "assistant", "content": "Sure"}]},
    ),
    "frequency_penalty": Set(0.5, {"sampling.frequency_penalty": 0.5}),
    "guided_choice": Set(["a", "b"], {"sampling.choices.texts": ["a", "b"]}),
    "guided_grammar": Set("start: /a/", {"sampling.lark": "start: /a/"}),
    "guided_json": Set('{"type": "object"}', {"sampling.json_schema": '{"type": "object"}'}),
    "guided_regex": Set("a+", {"sampling.regex": "a+"}),
    "ignore_eos": Set(True, {"sampling.ignore_eos": True}),
    "include_reasoning": Reply(False, (*CHOICE, "message", "content"), TEXT),  # more in test_calls
    "include_stop_str_in_output": Reply(True, (*CHOICE, "message", "content"), TEXT + "."),
    "logit_bias": Set({"42": -100, "7": 1.5}, {"sampling.logit_bias": {42: -100.0, 7: 1.5}}),
    "logprobs": Set(True, {"sampling.top_logprobs": 0}),
    "max_completion_tokens": Set(9, {"sampling.max_tokens": 9}, {"max_tokens": 5}),
    "max_tokens": Set(5, {"sampling.max_tokens": 5}),
    "messages": Set([user("Ho")], {"chat.messages.0.content": "Ho", "chat.messages.0.role": "user"}),
    "min_p": Set(0.5, {"sampling.min_p": 0.5}),
    "min_tokens": Set(3, {"sampling.min_tokens": 3}),
    "model": Set("large", {"routing.tier": "large", "routing.model": ""}),
    "n": Reply(2, ("choices", 1, "index"), 1),
    "parallel_tool_calls": Set(False, {"chat.parallel_tool_calls": False}, {"tools": [WEATHER]}),
    "presence_penalty": Set(-0.5, {"sampling.presence_penalty": -0.5}),
    "priority": Set(-2, {"routing.priority": 7}),
    "reasoning_effort": Set("low", {"chat.template_arguments": {"reasoning_effort": "low"}}),
    "repetition_penalty": Set(1.5, {"sampling.repetition_penalty": 1.5}),
    "request_id": Set("mine", {"request_id": "chatcmpl-mine"}),
    "response_format": Set({"type": "json_object"}, {"sampling.json_object": True}),
    "return_token_ids": Reply(True, (*CHOICE, "token_ids", 1), 101),
    "return_tokens_as_token_ids": Reply(
        True, (*CHOICE, "logprobs", "content", 0, "token"), "token_id:100", {"logprobs": True}
    ),
    "seed": Set(-1, {"sampling.seed": 2**64 - 1}),
    "stop": Set(["a", "b"], {"sampling.stop": ["a", "b"]}),
    "stop_token_ids": Set([5], {"sampling.stop_token_ids": [5]}),
    "stream": Set(True, {}),
    "stream_options": Set({"include_usage": True}, {}, {"stream": True}),
    "structured_outputs": Set({"regex": "a+"}, {"sampling.regex": "a+"}),
    "temperature": Set(0, {"sampling.temperature": 0.0}),
    "tool_choice": Set("required", {"chat.tool_choice.mode": pb.TOOL_MODE_REQUIRED}, {"tools": [WEATHER]}),
    "tools": Set([WEATHER], {"chat.tools.0.name": "weather", "chat.tools.0.parameters": '{"type":"object"}'}),
    "top_k": Set(5, {"sampling.top_k": 5}),
    "top_logprobs": Set(3, {"sampling.top_logprobs": 3}, {"logprobs": True}),
    "top_p": Set(0.5, {"sampling.top_p": 0.5}),
    "user": Set("ann", {"routing.tenant": "ann"}),
}
IGNORED: dict[str, Any] = {
    "kv_transfer_params": {"a": 1},
    "metadata": {"a": "b"},
    "mm_processor_kwargs": {},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "flex",
    "spaces_between_special_tokens": False,
    "store": True,
    "verbosity": "low",
    "vllm_xargs": {"a": 1},
}
# A value that is refused, and those that request nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True, False),
    "allowed_token_ids": ([1], []),
    "audio": ({"voice": "alloy", "format": "wav"},),
    "bad_words": (["x"], []),
    "cache_salt": ("s",),
    "chat_template": ("{{ messages }}",),
    "documents": ([{"text": "x"}], []),
    "echo": (True, False),
    "function_call": ({"name": "f"}, "none", "auto"),
    "functions": ([{"name": "f"}], []),
    "length_penalty": (2, 1, 1.0),
    "logits_processors": (["x"], []),
    "modalities": (["text", "audio"], ["text"]),
    "moderation": ({"model": "m"},),
    "prompt_logprobs": (0,),
    "skip_special_tokens": (False, True),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (True, False),
    "web_search_options": ({},),
}
TESTED: dict[str, Mapping[str, Any]] = {"supported": SUPPORTED, "ignored": IGNORED, "refused": REFUSED}


def field_of(request: Any, path: str) -> Any:
    """Return a field of a message by its path."""
    for part in path.split("."):
        request = request[int(part)] if part.isdigit() else getattr(request, part)
    if hasattr(request, "items"):
        return dict(request)
    return list(request) if path.endswith(("stop", "ids", "texts")) else request


@pytest.mark.parametrize("name", SUPPORTED)
async def test_a_supported_parameter_has_its_effect(plain: Edge, name: str) -> None:
    row = SUPPORTED[name]
    plain.router.stop_sequence = "."

    response = await plain.chat(**{**row.with_, name: row.value})

    assert response.status_code == 200, response.text
    assert "x-headrace-ignored" not in response.headers
    if isinstance(row, Set):
        assert {path: field_of(plain.asked, path) for path in row.asked} == row.asked
    else:
        found = response.json()
        for part in row.path:
            found = found[part]
        assert found == row.expected


@pytest.mark.parametrize("name", IGNORED)
async def test_an_ignored_parameter_is_named_in_a_header(plain: Edge, name: str) -> None:
    without = await plain.chat(request_id="same", seed=1)
    expected = plain.asked
    response = await plain.chat(request_id="same", seed=1, **{name: IGNORED[name]})

    assert response.status_code == without.status_code == 200
    assert response.headers["x-headrace-ignored"] == name
    assert plain.asked == expected


@pytest.mark.parametrize("name", REFUSED)
async def test_a_refused_parameter_is_an_error_unless_it_requests_nothing(plain: Edge, name: str) -> None:
    refused, *harmless = REFUSED[name]

    response = await plain.chat(**{name: refused})
    accepted = [await plain.chat(**{name: value}) for value in (None, *harmless)]

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == name
    assert error["code"] == "unsupported_parameter"
    assert error["message"].startswith(f"{name} is not supported: ")
    assert [other.status_code for other in accepted] == [200] * len(accepted)
    assert not any("x-headrace-ignored" in other.headers for other in accepted)


async def test_every_parameter_may_be_null(plain: Edge) -> None:
    names = {*SUPPORTED, *IGNORED, *REFUSED} - {"messages"}

    response = await plain.chat(**dict.fromkeys(names))

    assert response.status_code == 200
    assert "x-headrace-ignored" not in response.headers
    asked = pb.GenerateRequest()
    asked.CopyFrom(plain.asked)
    asked.sampling.ClearField("seed")  # drawn by the client of the mesh
    assert not asked.sampling.ListFields()
    assert not asked.routing.ListFields()


async def test_unknown_parameters_are_named_in_the_header_and_cannot_break_it(plain: Edge) -> None:
    unknown: dict[str, Any] = {"new": 1, "a\r\nb: c": 2, "ü" * 500: 3}
    numbered: dict[str, Any] = {f"p{number}": 1 for number in range(100)}

    response = await plain.chat(**unknown)
    many = await plain.chat(**numbered)

    assert response.headers["x-headrace-ignored"] == f"new, a??b??c, {'?' * 64}"
    assert many.headers["x-headrace-ignored"].endswith("p15, ...")


async def test_options_of_a_stream_are_ignored_without_it(plain: Edge) -> None:
    whole = await plain.chat(stream_options={"include_usage": True})
    streamed = await plain.chat(stream=True, stream_options={"include_obfuscation": True, "x": 1})

    assert whole.headers["x-headrace-ignored"] == "stream_options"
    assert streamed.headers["x-headrace-ignored"] == "stream_options.include_obfuscation, stream_options.x"


@pytest.mark.parametrize(
    ("refusal", "value", "applies"),
    [
        (Refusal("x", (True,)), 1, True),
        (Refusal("x", (True,)), True, False),
        (Refusal("x", (1,)), True, True),
        (Refusal("x", ([],)), [], False),
        (Refusal("x"), None, False),
    ],
)
def test_a_refusal_compares_types_too(refusal: Refusal, value: object, applies: bool) -> None:
    assert refusal.applies(value) is applies


# Values that are wrong, and what the message says after the name of the field.
WRONG: list[tuple[str, Any, str]] = [
    ("temperature", "0.5", "temperature is '0.5', must be a number"),
    ("temperature", True, "temperature is true, must be a number"),
    ("temperature", 99, "temperature is 99, must be 0 to 10"),
    ("temperature", 1e300, "temperature is inf, must be 0 to 10"),
    ("top_p", 0, "top_p is 0, must be above 0, at most 1"),
    ("min_p", 2, "min_p is 2, must be 0 to 1"),
    ("max_tokens", 0, "max_tokens is 0, must be at least 1"),
    ("max_tokens", 2**32, "max_tokens is 4294967296, must be at most 4294967295"),
    ("max_tokens", 1.5, "max_tokens is 1.5, must be an integer"),
    ("max_completion_tokens", 0, "max_completion_tokens is 0, must be at least 1"),
    ("min_tokens", -1, "min_tokens is -1, must be at least 0"),
    ("n", 0, "n is 0, must be at least 1"),
    ("n", 129, "n is 129, must be at most 128"),
    ("seed", -(2**63) - 1, "seed is -9223372036854775809, must be at least -9223372036854775808"),
    ("seed", 2**64, "seed is 18446744073709551616, must be at most 18446744073709551615"),
    ("seed", 10**100, f"seed is '1{'0' * 63}'... (101 characters), must be at most 18446744073709551615"),
    ("stop", 5, "stop is 5, must be a string or a list"),
    ("stop", ["a", 5], "stop[1] is 5, must be a string"),
    ("stop", "", "stop has a text of 0 characters, must be 1 to 256"),
    ("stop", ["a"] * 17, "stop has more than 16 elements: remove some"),
    ("stop_token_ids", [-1], "stop_token_ids[0] is -1, must be at least 0"),
    ("stream", "yes", "stream is 'yes', must be true or false"),
    ("stream_options", 3, "stream_options is 3, must be an object"),
    ("logit_bias", [], "logit_bias is a list, must be an object"),
    ("logit_bias", {"a": 1}, "logit_bias has the key 'a', must be a token id such as \"42\""),
    ("logit_bias", {"-1": 1}, "logit_bias has the key '-1', must be a token id such as \"42\""),
    ("logit_bias", {"4294967296": 1}, "logit_bias has the key '4294967296', must be"),
    ("logit_bias", {"1": "x"}, "logit_bias of token '1' must be a number"),
    ("logit_bias", {"1": True}, "logit_bias of token '1' must be a number"),
    ("logit_bias", {"1": 101}, "logit_bias of token 1 is 101, must be -100 to 100"),
    ("logit_bias", {"1": 10**400}, "logit_bias of token 1 is inf, must be -100 to 100"),
    ("logit_bias", {str(n): 0 for n in range(301)}, "logit_bias has more than 300 elements: remove some"),
    ("top_k", -2, "top_k is -2, must be at least -1"),
    ("top_logprobs", 3, "top_logprobs is set without logprobs: set logprobs to true"),
    ("priority", 6, "priority is 6, must be -4 (the most urgent) to 5"),
    ("priority", -5, "priority is -5, must be -4 (the most urgent) to 5"),
    ("user", "a\nb", "user must have 1 to 256 printable characters"),
    ("request_id", "ü", "request_id is 'ü', must be at most 64 printable ASCII characters"),
    ("request_id", "a" * 65, f"request_id is '{'a' * 64}'... (65 characters), must be at most 64"),
    ("reasoning_effort", "a" * 65, "reasoning_effort has more than 64 characters: shorten it"),
    ("add_generation_prompt", False, "add_generation_prompt is false without continue_final_message"),
    ("chat_template_kwargs", {"a": "b" * 2**14}, "chat_template_kwargs has more than 16384 bytes as JSON"),
    ("chat_template_kwargs", {"a": 10**400}, "chat_template_kwargs has a value that cannot be passed on"),
    ("continue_final_message", True, "continue_final_message is true, but the last message has role 'user'"),
    ("messages", None, "messages is null, must be a list"),
    ("messages", [], "messages is empty: add at least one element"),
    ("messages", [5], "messages[0] is 5, must be an object"),
    ("messages", [user("a"), {"content": "x"}], "messages[1].role is missing: set it"),
    ("messages", [user("a")] * 4097, "messages has more than 4096 elements: remove some"),
    ("messages", [{"role": "x", "content": "a"}], "messages[0].role is 'x', must be 'system', 'developer',"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content is 5, must be a string or a list"),
    ("messages", [{"role": "user"}], "messages[0].content is empty: set its text"),
    (
        "messages",
        [user("a"), {"role": "assistant", "content": "b"}],
        "messages[1].role is 'assistant' and the last one: set",
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=str)
async def test_a_wrong_value_is_explained_in_the_callers_words(
    plain: Edge, name: str, value: Any, message: str
) -> None:
    response = await plain.chat(**{name: value})

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(message)
    assert error["param"].startswith(name)
    assert error["type"] == "invalid_request_error"
    assert not plain.router.requests


async def test_a_deeply_nested_template_argument_is_refused(plain: Edge) -> None:
    nested: Any = 1
    for _ in range(17):
        nested = [nested]

    fine = await plain.chat(chat_template_kwargs={"a": nested[0][0]})
    deep = await plain.chat(chat_template_kwargs={"a": nested})

    assert fine.status_code == 200
    assert deep.json()["error"]["message"] == "chat_template_kwargs is nested deeper than 16 levels"


async def test_template_arguments_take_precedence_over_the_reasoning_effort(plain: Edge) -> None:
    await plain.chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"})

    assert dict(plain.asked.chat.template_arguments) == {"reasoning_effort": "high"}


async def test_a_continuation_begins_no_new_message(plain: Edge) -> None:
    turns = [user("Hi"), {"role": "assistant", "content": "Su"}]
    both = await plain.chat(messages=turns, continue_final_message=True, add_generation_prompt=True)
    as_vllm = await plain.chat(messages=turns, continue_final_message=True, add_generation_prompt=False)

    assert both.json()["error"]["param"] == "add_generation_prompt"
    assert as_vllm.status_code == 200


async def test_the_smallest_seed_and_an_unlimited_top_k_are_mapped(plain: Edge) -> None:
    await plain.chat(seed=-(2**63), top_k=-1)

    assert plain.asked.sampling.seed == 2**63
    assert plain.asked.sampling.top_k == 0
