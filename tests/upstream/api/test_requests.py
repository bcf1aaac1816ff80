"""Each field of the contract reaches the upstream, is rejected, or may be left out for a reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from google.protobuf.descriptor import Descriptor

from headrace import errors
from headrace.upstream.api.requests import to_http
from headrace.upstream.api.terms import APIS, Api
from headrace.v1 import generation_pb2 as pb
from tests.upstream.api.asking import HELLO, TIME, WEATHER, asked, body_of, terms

REFUSED: Final = "refused, and another tier may have it"
ABSENT: Final = "not in the body"

CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "a", "name": "get_time"}],
    "reasoning": "It wants the time.",
}
RESULT = {"role": "tool", "content": "noon", "tool_call_id": "a", "name": "get_time"}
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
READ: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
CLOSED = {**READ, "additionalProperties": False}


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"chat": fields}


def schema(inner: dict[str, Any]) -> dict[str, Any]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": inner, "strict": True},
        }
    }


# The field that a row is about; a request; what the body has then with each API.
ROWS: list[tuple[Any, ...]] = [
    # field, request, openai, vllm, llama.cpp
    ("Sampling.temperature", sampling(temperature=0.7), *[{"temperature": 0.7}] * 3),
    ("Sampling.temperature", sampling(temperature=0), *[{"temperature": 0.0}] * 3),
    ("Sampling.temperature", sampling(), {"temperature": ABSENT}, *[{"temperature": 1.0}] * 2),
    ("Sampling.temperature", sampling(temperature=3), REFUSED, REFUSED, {"temperature": 3.0}),
    ("Sampling.top_p", sampling(top_p=0.9), *[{"top_p": 0.9}] * 3),
    ("Sampling.top_p", sampling(), {"top_p": ABSENT}, *[{"top_p": 1.0}] * 2),
    ("Sampling.top_k", sampling(top_k=40), REFUSED, *[{"top_k": 40}] * 2),
    ("Sampling.top_k", sampling(top_k=0), {"top_k": ABSENT}, {"top_k": -1}, {"top_k": 0}),
    ("Sampling.top_k", sampling(), {"top_k": ABSENT}, {"top_k": -1}, {"top_k": 0}),
    ("Sampling.min_p", sampling(min_p=0.05), REFUSED, *[{"min_p": 0.05}] * 2),
    ("Sampling.min_p", sampling(min_p=0), {"min_p": ABSENT}, *[{"min_p": 0.0}] * 2),
    (
        "Sampling.repetition_penalty",
        sampling(repetition_penalty=1.1),
        REFUSED,
        {"repetition_penalty": 1.1},
        {"repeat_penalty": 1.1, "repeat_last_n": 131_072},
    ),
    (
        "Sampling.repetition_penalty",
        sampling(repetition_penalty=1),
        {"repetition_penalty": ABSENT},
        {"repetition_penalty": 1.0},
        {"repeat_penalty": 1.0, "repeat_last_n": ABSENT},
    ),
    ("Sampling.presence_penalty", sampling(presence_penalty=0.5), *[{"presence_penalty": 0.5}] * 3),
    ("Sampling.frequency_penalty", sampling(frequency_penalty=-0.5), *[{"frequency_penalty": -0.5}] * 3),
    ("Sampling.seed", sampling(seed=7), *[{"seed": 7}] * 3),
    ("Sampling.seed", sampling(seed=2**63 + 5), *[{"seed": 5}] * 2, {"seed": (2**63 + 5) % (2**32 - 1)}),
    ("Sampling.seed", sampling(seed=2**32 - 1), *[{"seed": 2**32 - 1}] * 2, {"seed": 0}),
    (
        "Sampling.max_tokens",
        sampling(max_tokens=9),
        {"max_completion_tokens": 9, "max_tokens": ABSENT},
        *[{"max_tokens": 9}] * 2,
    ),
    (
        "Sampling.max_tokens",
        sampling(max_tokens=9999),
        {"max_completion_tokens": 100},
        *[{"max_tokens": 100}] * 2,
    ),
    ("Sampling.max_tokens", sampling(), {"max_completion_tokens": 100}, *[{"max_tokens": 100}] * 2),
    ("Sampling.max_tokens", {"prompt": "Hi", **sampling(max_tokens=9)}, *[{"max_tokens": 9}] * 3),
    ("Sampling.min_tokens", sampling(min_tokens=2), REFUSED, {"min_tokens": 2}, REFUSED),
    ("Sampling.min_tokens", sampling(min_tokens=0), *[{"min_tokens": ABSENT}] * 3),
    ("Sampling.stop", sampling(stop=["a", "b"]), *[{"stop": ["a", "b"]}] * 3),
    ("Sampling.stop", sampling(stop=list("abcde")), REFUSED, REFUSED, {"stop": list("abcde")}),
    ("Sampling.ignore_eos", sampling(ignore_eos=True), REFUSED, *[{"ignore_eos": True}] * 2),
    ("Sampling.ignore_eos", sampling(ignore_eos=False), *[{"ignore_eos": ABSENT}] * 3),
    (
        "Sampling.logprobs",
        sampling(logprobs=True),
        *[{"logprobs": True, "top_logprobs": 0}] * 2,
        {"logprobs": True, "top_logprobs": 1},
    ),
    ("Sampling.logprobs", sampling(logprobs=False), *[{"logprobs": ABSENT}] * 3),
    (
        "Sampling.logprobs",
        {"prompt": "Hi", **sampling(logprobs=True)},
        *[{"logprobs": 0}] * 2,
        {"logprobs": 1},
    ),
    ("Sampling.logprobs", {**chat(tools=[TIME]), **sampling(logprobs=True)}, {}, {}, REFUSED),
    ("Sampling.logit_bias", sampling(logit_bias={"42": -1.5}), *[{"logit_bias": {"42": -1.5}}] * 3),
    ("Sampling.stop_token_ids", sampling(stop_token_ids=[2]), REFUSED, {"stop_token_ids": [2]}, REFUSED),
    ("Sampling.top_logprobs", sampling(top_logprobs=3), *[{"logprobs": True, "top_logprobs": 3}] * 3),
    ("Sampling.top_logprobs", {"prompt": "Hi", **sampling(top_logprobs=5)}, *[{"logprobs": 5}] * 3),
    ("Sampling.top_logprobs", {"prompt": "Hi", **sampling(top_logprobs=6)}, REFUSED, *[{"logprobs": 6}] * 2),
    ("Sampling.prompt_logprobs", sampling(prompt_logprobs=0), *[REFUSED] * 3),
    (
        "Sampling.json_schema",
        sampling(json_schema=SCHEMA),
        schema(CLOSED),
        schema(READ),
        {"json_schema": READ, "response_format": ABSENT},
    ),
    (
        "Sampling.json_schema",
        sampling(json_schema='{"type": "string"}'),
        REFUSED,
        schema({"type": "string"}),
        {"json_schema": {"type": "string"}},
    ),
    ("Sampling.json_schema", {"prompt": "Hi", **sampling(json_schema=SCHEMA)}, REFUSED, schema(READ), {}),
    (
        "Sampling.json_object",
        sampling(json_object=True),
        *[{"response_format": {"type": "json_object"}}] * 2,
        {"json_schema": {"type": "object"}},
    ),
    (
        "Sampling.regex",
        sampling(regex="a+"),
        REFUSED,
        {"structured_outputs": {"regex": "a+"}, "regex": "a+"},
        REFUSED,
    ),
    (
        "Sampling.choices",
        sampling(choices={"texts": ["yes", 'a "no"\n']}),
        REFUSED,
        {"structured_outputs": {"choice": ["yes", 'a "no"\n']}, "regex": '(yes|a\\ "no"\\\n)'},
        {"grammar": r'root ::= "yes" | "a \x22no\x22\x0A"'},
    ),
    (
        "Sampling.choices",
        {**chat(tools=[TIME]), **sampling(choices={"texts": ["yes"]})},
        REFUSED,
        {},
        REFUSED,
    ),
    (
        "Sampling.lark",
        sampling(lark='start: "a"'),
        REFUSED,
        {"structured_outputs": {"grammar": 'start: "a"'}},
        REFUSED,
    ),
    ("Chat.messages", chat(), *[{"messages": [HELLO]}] * 3),
    (
        "Chat.continue_final_message",
        chat(messages=[HELLO, {"role": "assistant", "content": "Hi"}], continue_final_message=True),
        REFUSED,
        *[{"continue_final_message": True, "add_generation_prompt": False}] * 2,
    ),
    (
        "Chat.template_arguments",
        chat(template_arguments={"enable_thinking": False}),
        REFUSED,
        *[{"chat_template_kwargs": {"enable_thinking": False}}] * 2,
    ),
    (
        "Chat.template_arguments",
        chat(template_arguments={"reasoning_effort": "low"}),
        {"reasoning_effort": "low", "chat_template_kwargs": ABSENT},
        *[{"chat_template_kwargs": {"reasoning_effort": "low"}}] * 2,
    ),
    ("Chat.template_arguments", chat(template_arguments={"reasoning_effort": 3}), REFUSED, {}, {}),
    ("Chat.template_arguments", chat(template_arguments={}), *[{"chat_template_kwargs": ABSENT}] * 3),
    (
        "Chat.tools",
        chat(tools=[{"name": "f", "description": "It fs.", "parameters": SCHEMA}]),
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "description": "It fs.", "parameters": CLOSED, "strict": True},
                }
            ]
        },
        *[
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "description": "It fs.", "parameters": READ},
                    }
                ]
            }
        ]
        * 2,
    ),
    ("Chat.tool_choice", chat(tools=[TIME]), *[{"tool_choice": ABSENT}] * 3),
    (
        "ToolChoice.mode",
        chat(tools=[TIME], tool_choice={"mode": "TOOL_MODE_REQUIRED"}),
        *[{"tool_choice": "required"}] * 3,
    ),
    (
        "ToolChoice.mode",
        chat(tools=[TIME], tool_choice={"mode": "TOOL_MODE_AUTO"}),
        *[{"tool_choice": "auto"}] * 3,
    ),
    (
        "ToolChoice.mode",
        chat(tools=[TIME], tool_choice={"mode": "TOOL_MODE_NONE"}),
        *[{"tool_choice": "none"}] * 3,
    ),
    (
        "ToolChoice.name",
        chat(tools=[TIME], tool_choice={"name": "get_time"}),
        *[{"tool_choice": {"type": "function", "function": {"name": "get_time"}}}] * 2,
        {"tool_choice": "required", "parallel_tool_calls": False},
    ),
    (
        "Chat.parallel_tool_calls",
        chat(tools=[TIME], parallel_tool_calls=False),
        *[{"parallel_tool_calls": False}] * 3,
    ),
    (
        "Message.role",
        chat(messages=[{"role": "developer", "content": "Be brief."}, HELLO]),
        *[{"messages": [{"role": "system", "content": "Be brief."}, HELLO]}] * 3,
    ),
    (
        "Message.tool_calls",
        chat(messages=[HELLO, {**CALLED, "reasoning": ""}, RESULT], tools=[TIME]),
        *[
            {
                "messages": [
                    HELLO,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "a",
                                "type": "function",
                                "function": {"name": "get_time", "arguments": "{}"},
                            }
                        ],
                    },
                    {"role": "tool", "content": "noon", "tool_call_id": "a", **name},
                ]
            }
            for name in ({}, {"name": "get_time"}, {"name": "get_time"})
        ],
    ),
    ("Message.tool_call_id", chat(messages=[HELLO, {"role": "tool", "content": "noon"}]), REFUSED, {}, {}),
    (
        "Message.name",
        chat(messages=[{**HELLO, "name": "ann"}]),
        *[{"messages": [{**HELLO, "name": "ann"}]}] * 3,
    ),
    (
        "Message.reasoning",
        chat(messages=[HELLO, {"role": "assistant", "content": "Hi", "reasoning": "Greet."}, HELLO]),
        *[
            {"messages": [HELLO, {"role": "assistant", "content": "Hi", **thought}, HELLO]}
            for thought in ({}, {"reasoning": "Greet."}, {"reasoning_content": "Greet."})
        ],
    ),
    ("GenerateRequest.prompt", {"prompt": "Hi"}, *[{"prompt": "Hi", "messages": ABSENT}] * 3),
    ("GenerateRequest.token_ids", {"token_ids": {"ids": [1]}}, *[REFUSED] * 3),
    ("Resume.attempt", {"resume": {"attempt": 2}}, *[{}] * 3),
]

# Fields without a parameter, and why.
WITHOUT: dict[str, str] = {
    "GenerateRequest.request_id": "identifies the request in the mesh only",
    "GenerateRequest.chat": "its fields have rows",
    "GenerateRequest.sampling": "its fields have rows",
    "GenerateRequest.routing": "its fields are below",
    "GenerateRequest.stream": "its fields are below",
    "GenerateRequest.resume": "its fields are below",
    "Message.content": "with the role",
    "ToolCall.id": "with the calls of a message",
    "ToolCall.name": "with the calls of a message",
    "ToolCall.arguments": "with the calls of a message",
    "Tool.name": "with the tools",
    "Tool.description": "with the tools",
    "Tool.parameters": "with the tools",
    "Choices.texts": "with the choices",
    "TokenIds.ids": "refused as a whole",
    "Resume.token_ids": "refused without another tier: see below",
    "Routing.tier": "must be the name of the tier: see below",
    "Routing.model": "must be the name of the model: see below",
    "Routing.min_tier": "a router has applied it",
    "Routing.max_tier": "a router has applied it",
    "Routing.quality_preference": "a router has applied it",
    "Routing.allow_escalation": "a router has applied it",
    "Routing.session_id": "the conversation is known to the router; it is not passed on to other services",
    "Routing.priority": "the order of waiting requests",
    "Routing.tenant": "who is accounted in the mesh; it is not passed on to other services",
    "Routing.cascade": "a router has applied it",
    "StreamOptions.include_token_ids": "`Accepted.text_only` says that there are none",
    "StreamOptions.flush_tokens": "deltas are as large as the events of the upstream",
    "StreamOptions.flush_interval": "deltas are passed on at once",
    "StreamOptions.include_route_changes": "the route does not change here",
}


def fields_of(message: Descriptor) -> Iterator[str]:
    """The fields of a message of the contract and of those in it, by its name."""
    for field in message.fields:
        yield f"{message.name}.{field.name}"
        inner = field.message_type
        if inner is not None and inner.file is message.file and not inner.GetOptions().map_entry:
            yield from fields_of(inner)


def test_each_field_of_a_request_is_decided() -> None:
    """A field that is added to the contract has no row here, until someone decides what becomes of it."""
    decided = {row[0] for row in ROWS} | WITHOUT.keys()

    assert set(fields_of(pb.GenerateRequest.DESCRIPTOR)) == decided


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_field_reaches_the_upstream_or_is_refused(row: tuple[Any, ...], api: Api) -> None:
    field, fields, *expected = row
    wanted = expected[APIS.index(api)]
    if wanted is REFUSED:
        with pytest.raises(errors.InvalidRequest) as raised:
            body_of(api, **fields)
        assert raised.value.fields[errors.FEATURE]
        assert field.rpartition(".")[2] in raised.value.field
        assert isinstance(raised.value, errors.InvalidSampling) == raised.value.field.startswith("sampling.")
        return

    body = body_of(api, **fields)

    for name, value in wanted.items():
        assert body.get(name, ABSENT) == value


@pytest.mark.parametrize("api", APIS)
def test_a_request_without_options_asks_for_a_stream_with_usage(api: Api) -> None:
    request = to_http(asked(), terms(api))

    assert request.path == "chat/completions"
    assert request.body["model"] == "gpt"
    assert request.body["stream"] is True
    assert request.body["stream_options"] == {
        "include_usage": True,
        **({"continuous_usage_stats": True} if api == "vllm" else {}),
    }


def test_a_raw_prompt_has_a_path_of_its_own() -> None:
    assert to_http(asked(prompt="Hi"), terms()).path == "completions"


def test_openai_receives_no_more_than_what_was_set() -> None:
    """Its reasoning models reject parameters that they do not support, even with their default."""
    assert body_of("openai").keys() == {
        "model",
        "messages",
        "max_completion_tokens",
        "stream",
        "stream_options",
    }


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"routing": {"tier": "small"}}, errors.UnknownTier, "routing.tier"),
        ({"routing": {"model": "llama"}}, errors.UnknownModel, "routing.model"),
        ({"resume": {"token_ids": [1]}}, errors.InvalidRequest, "resume.token_ids"),
        ({"sampling": {"top_p": 7}}, errors.InvalidSampling, "sampling.top_p"),
        ({"sampling": {"json_schema": "[1]"}}, errors.InvalidSampling, "sampling.json_schema"),
        ({"sampling": {"json_schema": " " * 40_000 + "{"}}, errors.InvalidSampling, "sampling.json_schema"),
        ({"chat": {"messages": []}}, errors.EmptyInput, "chat.messages"),
        (
            {"chat": {"tools": [{"name": "f", "parameters": " " * 40_000 + "{"}]}},
            errors.InvalidRequest,
            "chat.tools[0].parameters",
        ),
    ],
)
def test_an_invalid_request_is_rejected_before_it_is_sent(
    fields: dict[str, Any], error: type[errors.InvalidRequest], field: str
) -> None:
    with pytest.raises(error) as raised:
        body_of("vllm", **fields)

    assert raised.value.field == field
    assert errors.FEATURE not in raised.value.fields


def test_the_names_of_tier_and_model_are_accepted() -> None:
    assert body_of(routing={"tier": "large", "model": "gpt"})


def test_llama_cpp_sees_only_the_tool_that_it_must_call() -> None:
    body = body_of("llama.cpp", chat={"tools": [TIME, WEATHER], "tool_choice": {"name": "get_weather"}})

    assert [tool["function"]["name"] for tool in body["tools"]] == ["get_weather"]


def test_a_tool_with_optional_arguments_is_not_strict() -> None:
    (tool,) = body_of("openai", chat={"tools": [WEATHER]})["tools"]

    assert tool["function"]["strict"] is False
    assert "additionalProperties" not in tool["function"]["parameters"]


def test_calls_without_ids_receive_some() -> None:
    calls = [{"name": "get_time"}, {"name": "get_time", "arguments": '{"zone": "UTC"}'}]
    body = body_of("vllm", chat={"messages": [HELLO, {"role": "assistant", "tool_calls": calls}, HELLO]})

    assert [call["id"] for call in body["messages"][1]["tool_calls"]] == ["call_1_0", "call_1_1"]
