"""A batcher's tokenizer serves calls of its own without delaying the requests of its tier."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import errors
from headrace.batcher import tokenizer_service
from headrace.batcher.intake.intake import LONG_BYTES
from headrace.batcher.text.templates import ChatTemplate
from headrace.batcher.text.tokens import ByteTokenizer, Tokenizer, TransformersTokenizer, token_texts
from headrace.client import chat
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenizer_service_pb2 as tokens_pb
from headrace.validation import MAX_TOKENIZER_IDS
from headrace.worker.engine.echo import EchoEngine
from tests.batcher.text.test_chat_templates import CHATML
from tests.batcher.text.tiny_tokenizers import SPECIALS, byte_fallback, byte_level, metaspace_first
from tests.harness import PATIENCE, collect, eventually, prompt
from tests.mesh.test_template_arguments import WideEcho
from tests.tier import Tier, running_tier

TEXTS = st.lists(
    st.sampled_from(["the sky", " ", "\n", "é", "🚀", "Hello", *SPECIALS, "<", "x" * 40]),
    min_size=1,
    max_size=6,
).map("".join)
CONTENTS = TEXTS.filter(str.strip)


def with_template(fast: Any) -> TransformersTokenizer:
    return TransformersTokenizer(fast, ChatTemplate(CHATML, {}), ByteTokenizer.fingerprint)


@pytest.fixture(scope="module")
def byte_tokens() -> TransformersTokenizer:
    return with_template(byte_level())


def tokenize(text: str, **options: Any) -> tokens_pb.TokenizeRequest:
    return tokens_pb.TokenizeRequest(prompt=text, **options)


def count(text: str) -> tokens_pb.CountTokensRequest:
    return tokens_pb.CountTokensRequest(prompt=text)


@pytest.mark.parametrize("kind", ["bytes", "model"])
async def test_a_count_is_the_prompt_tokens_of_the_same_request(
    kind: str, byte_tokens: TransformersTokenizer
) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else byte_tokens
    roles = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
    turns = st.lists(st.tuples(roles, CONTENTS), max_size=4)
    async with running_tier([WideEcho()], tokenizer=tokenizer) as tier:

        @given(turns=turns, last=CONTENTS, continued=st.none() | CONTENTS)
        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        async def holds(turns: list[tuple[str, str]], last: str, continued: str | None) -> None:
            asked = chat([*turns, ("user", last)], max_tokens=1)
            if continued is not None:
                asked.chat.messages.add(role="assistant", content=continued)
                asked.chat.continue_final_message = True
            answer = await collect(tier.client, asked)
            counted = await tier.client.count_tokens(tokens_pb.CountTokensRequest(chat=asked.chat))
            whole = await tier.client.tokenize(tokens_pb.TokenizeRequest(chat=asked.chat))

            assert counted.tokens == answer.accepted.prompt_tokens == len(whole.token_ids)
            raw = await collect(tier.client, prompt(last, max_tokens=1))
            assert (await tier.client.count_tokens(count(last))).tokens == raw.accepted.prompt_tokens

        inner = holds.hypothesis.inner_test  # type: ignore[attr-defined]
        loop = asyncio.get_running_loop()
        holds.hypothesis.inner_test = lambda **kw: asyncio.run_coroutine_threadsafe(  # type: ignore[attr-defined]
            inner(**kw), loop
        ).result(PATIENCE)
        await asyncio.to_thread(holds)


@pytest.mark.parametrize("family", [byte_level, byte_fallback, metaspace_first])
@given(text=TEXTS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_text_is_the_text_of_its_tokens(family: Any, text: str) -> None:
    """With the names of special tokens. Texts of single tokens may be parts of characters."""
    tokenizer = MADE.setdefault(family, TransformersTokenizer(family(), None, "f"))
    if family is not byte_level:
        # Tokenizers with a space in front of each word lose one at the start and after a special token.
        text = f"x{text}" if not any(name in text for name in SPECIALS) else "x"
    ids = tokenizer.encode_text(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert b"".join(token_texts(tokenizer, ids)).decode() == text
    assert len(token_texts(tokenizer, ids)) == len(ids)


MADE: dict[Any, TransformersTokenizer] = {}


async def test_text_and_tokens_are_converted_with_the_names_of_special_tokens(
    byte_tokens: TransformersTokenizer,
) -> None:
    special = byte_tokens.special_tokens
    async with running_tier([WideEcho()], tokenizer=byte_tokens) as tier:
        client = tier.client
        asked = tokens_pb.TokenizeRequest(chat=chat("the é").chat, include_texts=True)
        found = await client.tokenize(asked)
        asked.add_generation_prompt = False
        asked.chat.messages.add(role="assistant", content="a")
        without = await client.tokenize(asked)
        asked.chat.continue_final_message = True
        continued = await client.tokenize(asked)
        plain = await client.tokenize(tokenize("the é"))
        text = await client.detokenize(tokens_pb.DetokenizeRequest(token_ids=found.token_ids))
        part = await client.detokenize(tokens_pb.DetokenizeRequest(token_ids=plain.token_ids[-1:]))

    assert b"".join(found.texts).decode() == text.text
    assert text.text == "<|im_start|>user\nthe é<|im_end|>\n<|im_start|>assistant\n"
    assert found.token_ids[0] == special["<|im_start|>"]
    assert found.texts[0] == b"<|im_start|>"
    assert byte_tokens.decode(without.token_ids).endswith("<|im_start|>assistant\na<|im_end|>\n")
    assert byte_tokens.decode(continued.token_ids).endswith("<|im_start|>assistant\na")
    assert plain.texts == []
    assert part.text == "\N{REPLACEMENT CHARACTER}"
    used = found.tokenizer
    assert (used.tier, used.model, used.context_length) == ("t", "echo", 4096)
    assert text.tokenizer == plain.tokenizer == used


async def test_special_tokens_in_front_of_a_text_are_added_unless_it_is_said() -> None:
    tokenizer = TransformersTokenizer(byte_fallback(), None, ByteTokenizer.fingerprint)
    async with running_tier([WideEcho()], tokenizer=tokenizer) as tier:
        default = await tier.client.tokenize(tokenize("the"))
        added = await tier.client.tokenize(tokenize("the", add_special_tokens=True))
        bare = await tier.client.tokenize(tokenize("the", add_special_tokens=False))
        with pytest.raises(errors.InvalidRequest, match="no chat template"):
            await tier.client.count_tokens(tokens_pb.CountTokensRequest(chat=chat("x").chat))

    assert default.token_ids == added.token_ids == [tokenizer.special_tokens["<s>"], *bare.token_ids]


@pytest.mark.parametrize(
    ("call", "request_", "error", "field"),
    [
        ("tokenize", tokens_pb.TokenizeRequest(), errors.EmptyInput, "input"),
        ("tokenize", tokenize(""), errors.EmptyInput, "prompt"),
        ("count_tokens", tokens_pb.CountTokensRequest(chat=pb.Chat()), errors.EmptyInput, "chat.messages"),
        (
            "count_tokens",
            tokens_pb.CountTokensRequest(chat=chat([("user", "a"), ("assistant", "b")]).chat),
            errors.InvalidRequest,
            "chat.messages[1].role",
        ),
        (
            "tokenize",
            tokens_pb.TokenizeRequest(chat=chat([("robot", "a")]).chat),
            errors.InvalidRequest,
            "chat.messages[0].role",
        ),
        ("detokenize", tokens_pb.DetokenizeRequest(), errors.EmptyInput, "token_ids"),
        ("detokenize", tokens_pb.DetokenizeRequest(token_ids=[258]), errors.InvalidRequest, "token_ids"),
        (
            "detokenize",
            tokens_pb.DetokenizeRequest(token_ids=[1] * (MAX_TOKENIZER_IDS + 1)),
            errors.InvalidRequest,
            "token_ids",
        ),
        ("tokenize", tokenize("x" * (MAX_TOKENIZER_IDS + 1)), errors.InvalidRequest, "input"),
        (
            "tokenize",
            tokenize("x", tokenizer=tokens_pb.TokenizerChoice(tier="other")),
            errors.UnknownTier,
            "tokenizer.tier",
        ),
        (
            "detokenize",
            tokens_pb.DetokenizeRequest(token_ids=[1], tokenizer=tokens_pb.TokenizerChoice(model="n" * 300)),
            errors.UnknownModel,
            "tokenizer.model",
        ),
    ],
)
async def test_a_call_that_cannot_succeed_is_rejected_by_its_field(
    echo: Tier, call: str, request_: Any, error: type[errors.HeadraceError], field: str
) -> None:
    with pytest.raises(error) as caught:
        await getattr(echo.client, call)(request_)

    assert type(caught.value) is error
    assert caught.value.field == field


@pytest.fixture(scope="module")
async def echo() -> Any:
    async with running_tier([EchoEngine()]) as tier:
        yield tier


class Gated(ByteTokenizer):
    """Encodes long texts only once its gate is open."""

    bound = None

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started = 0

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 1000:
            self.started += 1
            self.gate.wait(PATIENCE)
        return super().encode_text(text)


LONG = "x" * LONG_BYTES


async def test_calls_wait_for_each_other_but_requests_and_short_calls_do_not_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer_service, "MAX_WAITING", 3)
    tokenizer = Gated()
    async with running_tier([EchoEngine()], tokenizer=tokenizer, queue_limit=1) as tier:
        try:
            calls = []
            for waiting in (1, 2, 3):  # in order: the first one is tokenised, and the last one leaves
                calls.append(asyncio.create_task(tier.client.count_tokens(count(LONG), timeout=PATIENCE)))
                await calls_in_lanes(tier, waiting)
            await eventually(lambda: tokenizer.started == 1)
            answer = await collect(tier.client, prompt("hi"))
            short = await tier.client.count_tokens(count("hi"))
            with pytest.raises(errors.Overloaded, match="3 calls with") as refused:
                await tier.client.count_tokens(count(LONG))
            listed = (await tier.client.list_tiers()).tiers[0]
            calls[2].cancel()
            await calls_in_lanes(tier, 2)
            late = asyncio.create_task(tier.client.count_tokens(count(LONG), timeout=3))
            await calls_in_lanes(tier, 3)
            with pytest.raises(errors.DeadlineExceeded):
                await late
            await calls_in_lanes(tier, 2)
        finally:
            tokenizer.gate.set()
        counted = await asyncio.gather(*calls[:2])
        await eventually(lambda: not any(lane.waiting or lane.bytes for lane in lanes(tier)))

    assert answer.text == "hi"
    assert short.tokens == 2
    assert listed.load.queued == 0
    assert refused.value.retry_after is not None
    assert [one.tokens for one in counted] == [LONG_BYTES] * 2
    assert tokenizer.started == 2, "a call whose caller left is not tokenised"


async def test_long_calls_are_bounded_in_bytes() -> None:
    tokenizer = Gated()
    async with running_tier([EchoEngine()], tokenizer=tokenizer, intake_bytes=LONG_BYTES) as tier:
        try:
            first = asyncio.create_task(tier.client.count_tokens(count(LONG), timeout=PATIENCE))
            await eventually(lambda: tokenizer.started == 1)
            with pytest.raises(errors.Overloaded):
                await tier.client.count_tokens(count(LONG))
        finally:
            tokenizer.gate.set()
        assert (await first).tokens == LONG_BYTES


def lanes(tier: Tier) -> Sequence[Any]:
    return tier.batcher.tokenizers.lanes


async def calls_in_lanes(tier: Tier, calls: int) -> None:
    """Wait until so many calls are in the lanes."""
    await eventually(lambda: sum(lane.waiting for lane in lanes(tier)) == calls)


async def test_the_special_tokens_and_the_template_are_those_of_the_model() -> None:
    template = ChatTemplate(CHATML, {})
    tokenizer = TransformersTokenizer(
        byte_level(), template, ByteTokenizer.fingerprint, {"eos_token": "<|e|>"}
    )
    async with running_tier([WideEcho()], tokenizer=tokenizer) as tier:
        response = await tier.client.get_tokenizer(tokens_pb.GetTokenizerRequest())
        with pytest.raises(errors.UnknownTier):
            choice = tokens_pb.TokenizerChoice(tier="another")
            await tier.client.get_tokenizer(tokens_pb.GetTokenizerRequest(tokenizer=choice))

    assert dict(response.special_tokens) == {"eos_token": "<|e|>"}
    assert response.chat_template == CHATML
    assert response.tokenizer.context_length > 0
