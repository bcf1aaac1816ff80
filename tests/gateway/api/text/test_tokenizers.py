"""The endpoints of tokenizers have the form of vLLM's."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from tests.gateway.api.text.text_router import NAME, SPECIAL, TextEdge, text_edge

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="session")
async def running_with_one_tier() -> AsyncGenerator[TextEdge, None]:
    """A gateway whose mesh has one tier, for all tests of this file."""
    async with text_edge(small="tiny") as started:
        yield started


@pytest.fixture
async def edge(running_with_one_tier: TextEdge) -> TextEdge:
    """A gateway whose mesh has one tier, and no calls yet."""
    await running_with_one_tier.router.renew(running_with_one_tier.complete)
    running_with_one_tier.router.tiers = {"small": "tiny"}
    return running_with_one_tier


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_a_text_is_tokenized_with_special_tokens(edge: TextEdge, prefix: str) -> None:
    response = await edge.http.post(f"{prefix}/tokenize", json={"prompt": "Hi"})

    assert response.json() == {
        "count": 3,
        "max_model_len": 2048,
        "tokens": [SPECIAL, 72, 105],
        "token_strs": None,
    }


async def test_special_tokens_are_left_out_and_texts_added_by_request(edge: TextEdge) -> None:
    body = {"prompt": "Hé", "add_special_tokens": False, "return_token_strs": True}
    response = await edge.http.post("/tokenize", json=body)

    assert response.json()["tokens"] == [72, 195, 169]
    assert response.json()["token_strs"] == ["H", "�", "�"]


@pytest.mark.parametrize(
    ("parameters", "continued", "starts"),
    [
        ({}, False, True),
        ({"add_generation_prompt": True}, False, True),
        ({"add_generation_prompt": False}, False, False),
        ({"continue_final_message": True}, True, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True, False),
        ({"add_special_tokens": False}, False, True),
    ],
)
async def test_a_conversation_is_tokenized_by_the_chat_template(
    edge: TextEdge, parameters: dict[str, Any], continued: bool, starts: bool
) -> None:
    body = {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}, **parameters}
    response = await edge.http.post("/tokenize", json=body)

    assert response.json()["tokens"] == [72, 105]
    [call] = edge.router.calls
    assert call.chat.continue_final_message is continued
    assert call.add_generation_prompt is starts
    assert dict(call.chat.template_arguments) == {"enable_thinking": False}


async def test_the_chat_template_lists_the_tools(edge: TextEdge) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    response = await edge.http.post("/tokenize", json={"messages": HI, "tools": tools})
    ignored = await edge.http.post("/tokenize", json={"prompt": "Hi", "tools": tools})

    assert "x-headrace-ignored" not in response.headers
    assert ignored.headers["x-headrace-ignored"] == "tools"
    with_tools, without = edge.router.calls
    assert list(with_tools.chat.tools) == [pb.Tool(name="weather", parameters='{"type":"object"}')]
    assert not without.HasField("chat")


async def test_the_text_of_tokens_is_returned(edge: TextEdge) -> None:
    response = await edge.http.post("/detokenize", json={"tokens": [SPECIAL, 72, 105]})

    assert response.json() == {"prompt": f"{NAME}Hi"}


async def test_no_tokens_have_no_text(edge: TextEdge) -> None:
    assert (await edge.http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_special_tokens_and_chat_template_are_those_of_a_tokenizer_config(edge: TextEdge) -> None:
    response = await edge.http.get("/tokenizer_info")

    assert response.json() == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": NAME,
        "pad_token": None,
        "unk_token": None,
        "chat_template": "{{ messages }}",
        "model_max_length": 2048,
    }


@pytest.mark.parametrize(
    ("model", "tier", "pinned"),
    [("small", "", ("small", "")), ("tiny", "", ("", "tiny")), ("auto", "large", ("large", ""))],
)
async def test_the_model_or_the_header_names_the_tokenizer(
    edge: TextEdge, model: str, tier: str, pinned: tuple[str, str]
) -> None:
    headers = {"x-headrace-tier": tier} if tier else {}
    await edge.http.post("/tokenize", json={"prompt": "Hi", "model": model}, headers=headers)
    await edge.http.post("/detokenize", json={"tokens": [72], "model": model}, headers=headers)

    assert [(call.tokenizer.tier, call.tokenizer.model) for call in edge.router.calls] == [pinned] * 2


async def test_a_mesh_with_several_models_needs_a_name() -> None:
    async with text_edge(small="tiny", large="big") as edge:
        response = await edge.http.post("/tokenize", json={"prompt": "Hi"})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert "set model to one of 'small', 'large'" in response.json()["error"]["message"]
    assert not edge.router.calls


async def test_below_the_path_of_a_tier_no_name_is_needed() -> None:
    """Tools with a base URL only can use one tier of several."""
    async with text_edge(small="tiny", large="big") as edge:
        await edge.http.post("/tiers/large/tokenize", json={"prompt": "Hi"})
        await edge.http.get("/tiers/large/tokenizer_info", headers={"x-headrace-tier": "small"})
        await edge.http.post("/tiers/large/v1/completions", json={"prompt": [1]})
        unknown = [await edge.http.get(path) for path in ("/tiers/large/x", "/tiers/a/tiers/b/v1/models")]

    assert [call.tokenizer.tier for call in edge.router.calls] == ["large", "large"]
    assert edge.asked.routing.tier == "large"
    assert [response.status_code for response in unknown] == [404, 404]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("tokenize", {}, "prompt", "must be set, or messages"),
        ("tokenize", {"prompt": "Hi", "messages": HI}, "prompt", "but not both"),
        ("tokenize", {"prompt": 7}, "prompt", "must be a string"),
        ("tokenize", {"messages": []}, "messages", "messages"),
        ("tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens", "must be false"),
        (
            "tokenize",
            {"messages": HI, "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt",
            "must not be true together",
        ),
        ("tokenize", {"messages": HI, "tools": [{}]}, "tools[0].function", "tools[0].function is missing"),
        ("tokenize", {"messages": HI, "chat_template": "x"}, "chat_template", "not supported"),
        ("tokenize", {"prompt": "Hi", "model": "nobody"}, "model", "does not exist"),
        ("detokenize", {}, "tokens", "tokens is missing"),
        ("detokenize", {"tokens": [-1]}, "tokens[0]", "at least 0"),
        ("detokenize", {"tokens": ["a"]}, "tokens[0]", "must be an integer"),
        ("detokenize", {"tokens": [0] * 131_073}, "tokens", "more than 131072 elements"),
    ],
)
async def test_what_is_wrong_is_said_in_openais_shape(
    edge: TextEdge, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    response = await edge.http.post(f"/{path}", json=body)

    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not edge.router.calls


async def test_an_error_of_the_mesh_names_the_field_of_the_request(edge: TextEdge) -> None:
    edge.router.tokenizer_refuses = errors.InvalidRequest("token_ids has 9, of 5 ids", field="token_ids")
    response = await edge.http.post("/detokenize", json={"tokens": [9]})

    assert response.json()["error"]["param"] == "tokens"
    assert response.json()["error"]["message"].startswith("tokens has 9")


async def test_ignored_parameters_are_named_in_a_header(edge: TextEdge) -> None:
    response = await edge.http.post("/tokenize", json={"prompt": "Hi", "mm_processor_kwargs": {}, "x": 1})

    assert response.headers["x-headrace-ignored"] == "mm_processor_kwargs, x"
