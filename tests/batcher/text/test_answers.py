"""Answers as callers receive them: complete text, stop texts, continued messages, no delay for others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from headrace import errors
from headrace.batcher.inbox import Arrival, SequenceEnd
from headrace.batcher.text.answer import AnswerEvents
from headrace.batcher.text.templates import ChatTemplate
from headrace.batcher.text.tokens import THINK, ByteTokenizer, TransformersTokenizer
from headrace.batcher.tools.families import Family
from headrace.batcher.tools.form import FREE, AnswerForm
from headrace.batcher.turns import Turn
from headrace.client import chat
from headrace.metrics.requests import CANCELLED, End
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.interface import ModelInfo, Result, Row, Token
from tests.batcher.links.test_link import job
from tests.batcher.text.test_chat_templates import CHATML
from tests.batcher.text.tiny_tokenizers import byte_fallback, byte_level
from tests.harness import collect, prompt
from tests.tier import running_tier


class Script(EchoEngine):
    """Generates the same ids for every prompt."""

    def __init__(self, *ids: int, eos: int = EOS_ID) -> None:
        super().__init__()
        self._ids = ids
        self._eos = eos

    @property
    def model(self) -> ModelInfo:
        return replace(super().model, vocabulary_size=1000, eos_ids=frozenset({self._eos}))

    def step(self, rows: Sequence[Row]) -> list[Result]:
        return [result and self._next(row) for row, result in zip(rows, super().step(rows), strict=True)]

    def _next(self, row: Row) -> Token:
        offset = row.stop - row.prompt
        return Token(self._ids[offset] if offset < len(self._ids) else self._eos, 0.0)


def known(fast: Any, template: ChatTemplate | None = None) -> TransformersTokenizer:
    return TransformersTokenizer(fast, template, ByteTokenizer.fingerprint)


async def test_the_space_before_the_first_word_of_an_answer_is_part_of_it() -> None:
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


async def test_text_of_replacement_characters_is_not_held_back() -> None:
    """Each delta carries its own text: none waits for the end of the answer."""
    ids = list("\N{REPLACEMENT CHARACTER}".encode()) * 20
    async with running_tier([Script(*ids)]) as tier:
        asked = prompt("x")
        asked.stream.flush_tokens = 1
        held_back = sent = 0
        async for response in tier.client.generate(asked, timeout=60):
            sent += response.delta.token_count
            held_back += response.delta.token_count - len(response.delta.text.encode())
            assert held_back < 3

    assert sent == len(ids)


@pytest.mark.parametrize("least", [1, 5, 7, 30])
async def test_a_stop_text_ends_no_answer_before_min_tokens(least: int) -> None:
    text = "a.bcd.efg.hi"
    async with running_tier([EchoEngine()]) as tier:
        answer = await collect(
            tier.client, prompt(text, stop=["."], min_tokens=least, max_tokens=30, ignore_eos=True)
        )

    ends = [at for at in range(1, 31) if at >= least and (text * 3)[at - 1] == "."]
    assert answer.tokens == (ends[0] if ends else 30)
    assert answer.text == (text * 3)[: answer.tokens - (1 if ends else 0)]
    assert answer.finish.reason == (pb.FINISH_REASON_STOP_SEQUENCE if ends else pb.FINISH_REASON_LENGTH)


async def test_a_stop_text_may_be_a_special_token_but_not_contain_one() -> None:
    fast = byte_level()
    fast_ids = [*fast.encode("the sky").ids, fast.get_vocab()["<|im_end|>"], *fast.encode(" is").ids]
    async with running_tier([Script(*fast_ids)], tokenizer=known(fast)) as tier:
        answer = await collect(tier.client, prompt("x", stop=["<|im_end|>"]))
        with pytest.raises(errors.InvalidSampling, match=r"'<\|im_end\|>' alone"):
            await collect(tier.client, prompt("x", stop=["<|im_end|>\n"]))

    assert (answer.text, answer.finish.stop_sequence) == ("the sky", "<|im_end|>")
    assert answer.finish.reason == pb.FINISH_REASON_STOP_SEQUENCE


async def test_a_last_message_of_the_assistant_is_continued_or_rejected() -> None:
    fast = byte_level()
    tokenizer = known(fast, ChatTemplate(CHATML, {}))
    turns = [("user", "the sky"), ("assistant", ""), ("user", "and?"), ("assistant", "the sea ")]
    async with running_tier([Script(*fast.encode("is green").ids)], tokenizer=tokenizer) as tier:
        asked = chat(turns)
        with pytest.raises(errors.InvalidRequest, match="continue_final_message") as rejected:
            await collect(tier.client, asked)
        answer = await collect(tier.client, chat(turns, continue_final_message=True))
        with pytest.raises(errors.InvalidRequest, match="must be 'assistant'"):
            await collect(tier.client, chat("hi", continue_final_message=True))

    assert rejected.value.field == "chat.messages[3].role"
    assert answer.text == "is green"
    assert answer.accepted.prompt_tokens == len(
        tokenizer.encode_chat([Turn(*turn) for turn in turns], continue_final=True)
    )


class Watched(ByteTokenizer):
    """Records the threads on which answer tokens are decoded."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def spell(self, id: int, after: int | None) -> bytes:
        if id == 0x7A:
            self.threads.add(threading.get_ident())
        return super().spell(id, after)


async def test_tokens_that_come_with_a_request_are_decoded_off_the_event_loop() -> None:
    tokenizer = Watched()
    async with running_tier([EchoEngine()], tokenizer=tokenizer, max_tokens=3001) as tier:
        asked = prompt("x", max_tokens=3001, ignore_eos=True)
        asked.resume.token_ids.extend(b"z" * 3000)
        answer = await collect(tier.client, asked)

    assert answer.tokens == 1
    assert tokenizer.threads
    assert threading.get_ident() not in tokenizer.threads


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (End.complete("stop_sequence"), "over_generation"),
        (CANCELLED, "cancel"),
        (End.by(errors.DeadlineInDecode("late")), "deadline"),
        (End.by(errors.SlowReader("slow")), "slow_reader"),
        (End.by(errors.WorkerLost("lost")), "failover"),
    ],
)
def test_tokens_that_were_not_delivered_are_wasted(count: Callable[..., float], end: End, cause: str) -> None:
    one = job()
    one.sampling.max_tokens = 100
    one.sampling.stop.append("c")
    answer = AnswerEvents(one, pb.GenerateRequest(), ByteTokenizer(), tier="wasteful")
    one.generated = list(b"abcdefgh")
    before = count("headrace.tokens.wasted", tier="wasteful", cause=cause)
    list(answer.events_for(Arrival(one.generated, [], None)))

    answer.record(end)

    assert count("headrace.tokens.wasted", tier="wasteful", cause=cause) == before + 5, "abc was delivered"
    assert one.history.waste_cause == cause, "of tokens that are still to come"


async def test_the_backlog_of_a_slow_reader_is_sent_in_slices() -> None:
    """So that other calls can proceed in between."""
    one = job()
    one.sampling.max_tokens = 10_000
    answer = AnswerEvents(one, pb.GenerateRequest(), ByteTokenizer(), tier="t")
    ids = list(b"abc" * 1500)

    events = [event.delta for event in answer.events_for(Arrival(ids, [0.5] * len(ids), None))]

    assert max(delta.token_count for delta in events) <= 1024
    assert [delta.offset for delta in events] == [0, 1024, 2048, 3072, 4096]
    assert "".join(delta.text for delta in events) == "abc" * 1500
    assert all(len(delta.logprobs) == delta.token_count for delta in events)


TOOLS = frozenset({"get"})
PARIS = '{"name": "get", "arguments": {"city": "Pa\\"r}is"}}'
SPECIAL = {"[TOOL_CALLS]": 300, "[ARGS]": 301, "</think>": 302}
HERMES = AnswerForm(family=Family.HERMES, tools=TOOLS, reasoning=THINK)
MISTRAL = AnswerForm(
    family=Family.MISTRAL,
    tools=TOOLS,
    reasoning=THINK,
    thinking=True,
    markers={id: name for name, id in SPECIAL.items()},
)
ANSWERS: list[tuple[AnswerForm, list[str | int]]] = [
    (FREE, ["<think>é</think><tool_call>"]),
    (
        HERMES,
        [
            f"<think>\nI see\n</think>\n\né\n<tool_call>\n{PARIS}\n</tool_call>\n",
            f"<tool_call>{PARIS}</tool_call>",
        ],
    ),
    (HERMES, [f"<tool_call>{PARIS}</tool_call>\n<tool_call> no call"]),
    (HERMES, [f"<tool_call>\n{PARIS[:-9]}"]),
    (HERMES, ["<think>never closed \n "]),
    (HERMES, ["text <tool_ca"]),
    (MISTRAL, ["<think>[ARGS]</think>", 302, "[TOOL_CALLS]get[ARGS]{}"]),
    (MISTRAL, ["well", 302, " é[", 300, "get", 301, '{"a": [1]}', 300, "get", 301, "{}"]),
]


def answer(form: AnswerForm, resumed: list[int] | None = None, *stops: str) -> AnswerEvents:
    one = job()
    one.sampling.max_tokens = 1000
    one.sampling.stop.extend(stops)
    one.form, one.resume_ids = form, resumed or []
    events = AnswerEvents(one, pb.GenerateRequest(), ByteTokenizer(), tier="t")
    if resumed:
        events.replay()
    return events


def joined(deltas: Sequence[pb.Delta]) -> tuple[str, str, list[tuple[int, str, str, str]]]:
    """Return text, reasoning and calls of an answer, of which the first delta may be within a call."""
    calls: list[tuple[int, str, str, str]] = []
    for part in (part for delta in deltas for part in delta.tool_calls):
        if part.name or not calls:
            calls.append((part.index, part.id, part.name, part.arguments))
        else:
            assert (part.index, part.id) == (calls[-1][0], "")
            calls[-1] = (*calls[-1][:3], calls[-1][3] + part.arguments)
    return "".join(delta.text for delta in deltas), "".join(delta.reasoning for delta in deltas), calls


def deltas(events: AnswerEvents, ids: Sequence[int], tokens: int) -> list[pb.Delta]:
    """Return the deltas of an answer that arrives in parts of so many tokens, without its end."""
    made = [
        event.delta
        for at in range(0, len(ids), tokens)
        for event in events.events_for(Arrival(list(ids[at : at + tokens]), [], None))
    ]
    assert sum(delta.token_count for delta in made) == len(ids)
    return made


def rest(events: AnswerEvents) -> list[pb.Delta]:
    """Return the delta that the end of an answer adds, if any."""
    *held, finish = events.events_for(
        Arrival([], [], SequenceEnd(pb.FINISH_REASON_STOP, pb.Usage(), pb.Timing()))
    )
    assert finish.HasField("finish")
    assert all(event.delta.token_count == 0 and event.delta.ByteSize() > 2 for event in held)
    return [event.delta for event in held]


@pytest.mark.parametrize(("form", "pieces"), ANSWERS)
@pytest.mark.parametrize("tokens", [1, 3, 1000])
def test_an_answer_with_calls_that_is_resumed_anywhere_is_the_same(
    form: AnswerForm, pieces: list[str | int], tokens: int
) -> None:
    """Its parts of all kinds, with the ids of calls; only what was held back to the end may come again."""
    ids = [id for piece in pieces for id in ([piece] if isinstance(piece, int) else piece.encode())]
    once = answer(form)
    each = deltas(once, ids, 1)
    ends = rest(once)
    whole = joined(each + ends)

    for offset in range(len(ids) + 1):
        resumed = answer(form, ids[:offset])
        after = deltas(resumed, ids[offset:], tokens)
        assert joined([*each[:offset], *after]) == joined(each), "what is released"
        assert joined([*each[:offset], *after, *rest(resumed)]) == whole


def test_calls_have_ids_of_their_own_in_the_first_part_only() -> None:
    ids = f"<tool_call>{PARIS}</tool_call>" * 2
    events = answer(HERMES)

    parts = [part for delta in deltas(events, ids.encode(), 1) for part in delta.tool_calls]

    named = [part for part in parts if part.name]
    assert [part.index for part in named] == [0, 1]
    assert len({part.id for part in named}) == 2
    assert not any(part.id for part in parts if not part.name)
    assert joined(deltas(answer(HERMES), ids.encode(), 1000)) == joined([pb.Delta(tool_calls=parts)])


def test_a_stop_text_neither_contains_nor_spans_a_marker_without_text() -> None:
    ids = [*b"a", 302, *b"b[", 300, *b"get", 301, *b'{"x": 1}', *b"c"]
    stopped = answer(MISTRAL, None, "[T", "ab", "b[g", "TOOL", "c")

    (*made, finish) = stopped.events_for(Arrival(ids, [], None))

    assert joined([event.delta for event in made])[:2] == ("b[", "a")
    assert [call[2:] for call in joined([event.delta for event in made])[2]] == [("get", '{"x": 1}')]
    assert finish.finish.stop_sequence == "c"


def test_a_stop_text_within_a_call_ends_the_answer_there() -> None:
    stopped = answer(HERMES, None, "is")

    (*made, finish) = stopped.events_for(Arrival(list(f"<tool_call>{PARIS}".encode()), [], None))

    assert [call[3] for call in joined([event.delta for event in made])[2]] == ['{"city": "Pa\\"r}']
    assert finish.finish.stop_sequence == "is"
