"""One model with two sets of template arguments is two tiers: two batchers share one worker."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from google.protobuf import json_format

from headrace.batcher.__main__ import batcher
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.batcher.text.templates import ChatTemplate
from headrace.batcher.text.tokens import ByteTokenizer, TransformersTokenizer
from headrace.client import chat, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings as RouterSettings
from headrace.v1 import tokenizer_service_pb2 as tokens_pb
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import ModelInfo
from tests.batcher.text.tiny_tokenizers import byte_level
from tests.harness import collect, running_worker, until_healthy

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %} thinks{% else %} answers{% endif %}"
)


class WideEcho(EchoEngine):
    """Has as many tokens as the tokenizer."""

    @property
    def model(self) -> ModelInfo:
        return replace(super().model, vocabulary_size=1000)


async def test_one_model_with_two_sets_of_template_arguments_is_two_tiers(tmp_path: Path) -> None:
    fast = byte_level(())
    tokenizer = TransformersTokenizer(fast, ChatTemplate(TEMPLATE, {}), ByteTokenizer.fingerprint)
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(running_worker(WideEcho()))
        targets = []
        for tier, arguments in (("quick", '{"enable_thinking": false}'), ("thinking", "")):
            running = await stack.enter_async_context(
                batcher(
                    BatcherSettings(
                        port=0,
                        tier=tier,
                        workers=f"127.0.0.1:{worker.server.port}",
                        fake=True,
                        drain_seconds=2.0,
                        template_arguments=arguments,
                    ),
                    tokenizer,
                    tier,
                )
            )
            targets.append(f"{tier}=127.0.0.1:{running.server.port}")
        gate = await stack.enter_async_context(
            router(RouterSettings(port=0, tiers=",".join(targets), poll_seconds=0.1, drain_seconds=2.0))
        )
        client = await stack.enter_async_context(connect(f"127.0.0.1:{gate.port}"))
        await until_healthy(client)
        answers = {}
        for tier in ("quick", "thinking"):
            request = chat("the sky")
            request.routing.tier = tier
            answers[tier] = await collect(client, request)
            counted = await client.count_tokens(
                tokens_pb.CountTokensRequest(
                    chat=request.chat, tokenizer=tokens_pb.TokenizerChoice(tier=tier)
                )
            )
            assert counted.tokens == answers[tier].accepted.prompt_tokens
            assert (counted.tokenizer.tier, counted.tokenizer.model) == (tier, "echo")
        json_format.ParseDict({"enable_thinking": True}, request.chat.template_arguments)
        request.routing.tier = "quick"
        asked = await collect(client, request)
        either = await collect(client, chat("the sky"))

    assert {tier: answer.text for tier, answer in answers.items()} == {
        "quick": "the sky answers",
        "thinking": "the sky thinks",
    }
    assert asked.text == "the sky thinks"
    assert {answer.accepted.model for answer in answers.values()} == {"echo"}
    assert either.accepted.tier in ("quick", "thinking")
