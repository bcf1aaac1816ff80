"""The tools of a request reach the prompt of the model, over gRPC."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from headrace import errors, models
from headrace.batcher.text.templates import ChatTemplate
from headrace.batcher.text.tokens import ByteTokenizer, TransformersTokenizer, load_tokenizer
from headrace.batcher.tools.instructions import HEAD
from headrace.checks.conversations import READ_AT_ONCE
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenizer_service_pb2 as tokens_pb
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import ModelInfo
from tests.batcher.text.tiny_tokenizers import byte_level
from tests.batcher.text.tool_templates import QWEN_25
from tests.harness import collect
from tests.tier import Tier, running_tier

CITY = '{"type": "object", "properties": {"city": {"type": "string"}, "at": {}}, "required": ["city"]}'


class WideEcho(EchoEngine):
    """Has as many tokens as the largest tokenizer here."""

    @property
    def model(self) -> ModelInfo:
        return replace(super().model, vocabulary_size=200_000)


@pytest.fixture(scope="module")
async def tier() -> AsyncGenerator[Tier, None]:
    tokenizer = TransformersTokenizer(byte_level(), ChatTemplate(QWEN_25, {}), ByteTokenizer.fingerprint)
    engine = WideEcho(context_length=1 << 18, kv_blocks=1 << 15)
    async with running_tier([engine], tokenizer=tokenizer) as running:
        yield running


def conversation() -> pb.Chat:
    chat = pb.Chat(tool_choice=pb.ToolChoice(mode=pb.TOOL_MODE_NONE))
    chat.tools.add(name="get_weather", description="The weather.", parameters=CITY)
    chat.messages.add(role="developer", content="Be brief.")
    chat.messages.add(role="user", content="Is it warm?")
    call = pb.ToolCall(id="call_1", name="get_weather", arguments='{"city": "Berlin", "at": null}')
    chat.messages.add(role="assistant", tool_calls=[call])
    chat.messages.add(role="tool", content="18 C", tool_call_id="call_1")
    return chat


async def written(tier: Tier, chat: pb.Chat) -> str:
    """Return the prompt of a chat, by the tier's own tokenizer."""
    encoded = await tier.client.tokenize(tokens_pb.TokenizeRequest(chat=chat))
    decoded = await tier.client.detokenize(tokens_pb.DetokenizeRequest(token_ids=encoded.token_ids))
    counted = await tier.client.count_tokens(tokens_pb.CountTokensRequest(chat=chat))
    assert counted.tokens == len(encoded.token_ids)
    return decoded.text


async def test_a_prompt_has_the_tools_and_calls_of_its_request(tier: Tier) -> None:
    """Also if the model may call none: it still sees what earlier calls refer to."""
    chat = conversation()

    text = await written(tier, chat)
    answer = await collect(tier.client, pb.GenerateRequest(chat=chat, sampling=pb.Sampling(max_tokens=1)))

    function = {"name": "get_weather", "description": "The weather.", "parameters": json.loads(CITY)}
    assert json.dumps({"type": "function", "function": function}) in text
    assert '{"name": "get_weather", "arguments": {"city": "Berlin", "at": null}}' in text
    assert "<tool_response>\n18 C\n</tool_response>" in text
    assert text.startswith("<|im_start|>system\nBe brief.")
    counted = await tier.client.count_tokens(tokens_pb.CountTokensRequest(chat=chat))
    assert answer.accepted.prompt_tokens == counted.tokens


async def test_an_error_in_json_that_the_event_loop_does_not_read_is_reported_with_its_place(
    tier: Tier,
) -> None:
    chat = conversation()
    chat.tools.add(name="long", parameters='{"a": "' + "x" * READ_AT_ONCE + '"}')
    assert "xxx" in await written(tier, chat)

    chat.messages[2].tool_calls.add(name="long", arguments="{")
    for call in (
        tier.client.count_tokens(tokens_pb.CountTokensRequest(chat=chat)),
        collect(tier.client, pb.GenerateRequest(chat=chat)),
    ):
        with pytest.raises(errors.InvalidRequest, match="not JSON") as caught:
            await call
        assert caught.value.field == "chat.messages[2].tool_calls[1].arguments"


async def test_tools_that_do_not_fit_the_context_are_rejected_before_they_are_tokenised() -> None:
    tokenizer = TransformersTokenizer(byte_level(), ChatTemplate(QWEN_25, {}), ByteTokenizer.fingerprint)
    encoded: list[int] = []
    original = tokenizer._specials.encode
    tokenizer._specials.encode = lambda text, marks: encoded.append(len(text)) or original(text, marks)  # type: ignore[method-assign, func-returns-value]
    chat = conversation()
    chat.tools[0].description = "x" * 500_000
    async with running_tier([WideEcho(context_length=256)], tokenizer=tokenizer) as tier:
        with pytest.raises(errors.ContextTooLong):
            await collect(tier.client, pb.GenerateRequest(chat=chat))

    assert not encoded


@pytest.mark.model
@pytest.mark.parametrize("name", [models.SMALL, models.LARGE])
async def test_the_default_models_see_the_tools(name: str) -> None:
    cache = models.cache_folder()
    tokenizer: Any = load_tokenizer(models.resolve(name, cache), cache)
    tokenizer._fingerprint = ByteTokenizer.fingerprint  # of the echo engine, which computes nothing here
    async with running_tier([WideEcho()], tokenizer=tokenizer) as tier:
        text = await written(tier, conversation())

    assert '"name": "get_weather", "description": "The weather.", "parameters": {"type": "object"' in text
    assert '{"name": "get_weather", "arguments": {"city": "Berlin", "at": null}}' in text
    assert "18 C" in text
    assert (HEAD in text) is (name == models.SMALL)
    assert text.endswith("<|im_start|>assistant\n")
