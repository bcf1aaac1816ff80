"""Answers as callers get them: whole text, stop texts, continued messages, and nobody else held up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from headrace import errors
from headrace.batcher.inbox import Arrival
from headrace.batcher.text.answer import Answer
from headrace.batcher.text.templates import ChatTemplate
from headrace.batcher.text.tokens import ByteTokenizer, TransformersTokenizer
from headrace.client import chat
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.interface import Fault, ModelInfo, Row, Token
from tests.batcher.links.test_link import job
from tests.batcher.text.test_chat_templates import CHATML
from tests.batcher.text.tiny_tokenizers import byte_fallback, byte_level
from tests.harness import collect, prompt
from tests.tier import running_tier


class Script(EchoEngine):
    """Says the same ids to everybody."""

    def __init__(self, *ids: int, eos: int = EOS_ID) -> None:
        super().__init__()
        self._ids = ids
        self._eos = eos

    @property
    def model(self) -> ModelInfo:
        return replace(super().model, vocabulary_size=1000, eos_ids=frozenset({self._eos}))

    def step(self, rows: Sequence[Row], *rest: Any) -> list[Token | Fault | None]:
        return [
            result and self._next(row) for row, result in zip(rows, super().step(rows, *rest), strict=True)
        ]

    def _next(self, row: Row) -> Token:
        said = row.stop - row.prompt
        return Token(self._ids[said] if said < len(self._ids) else self._eos, 0.0)


def known(fast: Any, template: ChatTemplate | None = None) -> TransformersTokenizer:
    return TransformersTokenizer(fast, template, ByteTokenizer.fingerprint)


async def test_the_blank_before_the_first_word_of_an_answer_is_part_of_it() -> None:
    fast = byte_fallback()
    world, the = (fast.get_vocab()[word] for word in ("▁world", "▁the"))
    engine = Script(world, the)
    async with running_tier([engine], tokenizer=known(fast)) as tier:
        whole = await collect(tier.client, prompt("Hello", max_tokens=2))
        stopped = await collect(tier.client, prompt("Hello", max_tokens=2, stop=[" world"]))
        asked = prompt("Hello", max_tokens=2)
        asked.resume.token_ids.append(world)
        resumed = await collect(tier.client, asked)

    assert whole.text == " world the"
    assert (stopped.text, stopped.finish.stop_sequence) == ("", " world")
    assert resumed.text == " the"


async def test_text_of_replacement_characters_comes_as_it_is_made() -> None:
    """Each delta carries its own: none waits for the end of the answer."""
    ids = list("\N{REPLACEMENT CHARACTER}".encode()) * 20
    async with running_tier([Script(*ids)]) as tier:
        asked = prompt("x")
        asked.stream.flush_tokens = 1
        kept_back = said = 0
        async for response in tier.client.generate(asked, timeout=60):
            said += response.delta.token_count
            kept_back += response.delta.token_count - len(response.delta.text.encode())
            assert kept_back < 3

    assert said == len(ids)


@pytest.mark.parametrize("least", [1, 5, 7, 30])
async def test_a_stop_text_ends_no_answer_before_its_fewest_tokens(least: int) -> None:
    text = "a.bcd.efg.hi"
    async with running_tier([EchoEngine()]) as tier:
        answer = await collect(
            tier.client, prompt(text, stop=["."], min_tokens=least, max_tokens=30, ignore_eos=True)
        )

    ends = [at for at in range(1, 31) if at >= least and (text * 3)[at - 1] == "."]
    assert answer.tokens == (ends[0] if ends else 30)
    assert answer.text == (text * 3)[: answer.tokens - (1 if ends else 0)]
    assert answer.finish.reason == (pb.FINISH_REASON_STOP_SEQUENCE if ends else pb.FINISH_REASON_LENGTH)


async def test_a_stop_text_that_names_a_special_token_is_found_and_one_that_holds_it_is_refused() -> None:
    fast = byte_level()
    fast_ids = [*fast.encode("the sky").ids, fast.get_vocab()["<|im_end|>"], *fast.encode(" is").ids]
    async with running_tier([Script(*fast_ids)], tokenizer=known(fast)) as tier:
        answer = await collect(tier.client, prompt("x", stop=["<|im_end|>"]))
        with pytest.raises(errors.InvalidSampling, match=r"'<\|im_end\|>' alone"):
            await collect(tier.client, prompt("x", stop=["<|im_end|>\n"]))

    assert (answer.text, answer.finish.stop_sequence) == ("the sky", "<|im_end|>")
    assert answer.finish.reason == pb.FINISH_REASON_STOP_SEQUENCE


async def test_a_last_message_of_the_assistant_is_continued_or_refused() -> None:
    fast = byte_level()
    tokenizer = known(fast, ChatTemplate(CHATML, {}))
    turns = [("user", "the sky"), ("assistant", ""), ("user", "and?"), ("assistant", "the sea ")]
    async with running_tier([Script(*fast.encode("is green").ids)], tokenizer=tokenizer) as tier:
        asked = chat(turns)
        with pytest.raises(errors.InvalidRequest, match="continue_final_message") as refused:
            await collect(tier.client, asked)
        answer = await collect(tier.client, chat(turns, continue_final_message=True))
        with pytest.raises(errors.InvalidRequest, match="only one of role 'assistant'"):
            await collect(tier.client, chat("hi", continue_final_message=True))

    assert refused.value.field == "chat.messages[3].role"
    assert answer.text == "is green"
    assert answer.accepted.prompt_tokens == len(tokenizer.encode_chat(turns, continue_final=True))


class Watched(ByteTokenizer):
    """Notes on which threads tokens of answers are spelled."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def spell(self, id: int, after: int | None) -> bytes:
        if id == 0x7A:
            self.threads.add(threading.get_ident())
        return super().spell(id, after)


async def test_tokens_that_come_with_a_request_are_replayed_off_the_event_loop() -> None:
    tokenizer = Watched()
    async with running_tier([EchoEngine()], tokenizer=tokenizer, max_tokens=3001) as tier:
        asked = prompt("x", max_tokens=3001, ignore_eos=True)
        asked.resume.token_ids.extend(b"z" * 3000)
        answer = await collect(tier.client, asked)

    assert answer.tokens == 1
    assert tokenizer.threads
    assert threading.get_ident() not in tokenizer.threads


async def test_what_waited_for_a_slow_reader_comes_in_slices() -> None:
    """So that others have their turn between them."""
    one = job()
    one.sampling.max_tokens = 10_000
    answer = Answer(one, pb.GenerateRequest(), ByteTokenizer(), {})
    ids = list(b"abc" * 1500)

    events = [event.delta for event in answer.take(Arrival(ids, [0.5] * len(ids), None))]

    assert max(delta.token_count for delta in events) <= 1024
    assert [delta.offset for delta in events] == [0, 1024, 2048, 3072, 4096]
    assert "".join(delta.text for delta in events) == "abc" * 1500
    assert all(len(delta.logprobs) == delta.token_count for delta in events)
