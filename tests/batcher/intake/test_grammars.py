"""A request whose answer has a grammar waits until the grammar is known to work, as it would in the queue."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from headrace import deadline, errors
from headrace.batcher.intake.grammars import GrammarCheck
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.grammars.checker import Checker
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Answer, collect, eventually
from tests.tier import Tier, running_tier

OBJECT = '{"type": "object", "properties": {"a": {"type": "null"}}}'


class PlainEngine(EchoEngine):
    """Supports no grammars."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        features = tuple(feature for feature in self._model.features if feature != "structured")
        self._model = replace(self._model, features=features)


class Gate:
    """Holds each check of a grammar until it is opened, and records the grammars in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checked: list[str] = []
        self._gate = threading.Event()
        check = Checker.check

        def gated(checker: Checker, grammar: str) -> None:
            if not checker.is_known(grammar):
                self.checked.append(grammar)
                self._gate.wait(PATIENCE)
            check(checker, grammar)

        monkeypatch.setattr(Checker, "check", gated)

    def open(self) -> None:
        self._gate.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@asynccontextmanager
async def gated(gate: Gate, **settings: Any) -> AsyncGenerator[Tier, None]:
    async with running_tier([EchoEngine(max_running=2)], **settings) as tier:
        try:
            yield tier
        finally:
            gate.open()


def choosing(text: str, **routing: Any) -> pb.GenerateRequest:
    """Return a request whose grammar is its own, which the prompt of an echo has."""
    sampling = pb.Sampling(max_tokens=20, choices=pb.Choices(texts=[text]))
    return pb.GenerateRequest(prompt=text, sampling=sampling, routing=pb.Routing(**routing))


def ask(tier: Tier, asked: pb.GenerateRequest, timeout: float = PATIENCE) -> asyncio.Task[Answer]:
    return asyncio.create_task(collect(tier.client, asked, timeout=timeout))


def waiting(tier: Tier) -> int:
    return tier.batcher.intake.waiting


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (pb.Sampling(json_schema='{"items": {"not": {}}}'), "sampling.json_schema at /items/not: "),
        (pb.Sampling(json_schema='{"format": "phone"}'), "sampling.json_schema at /format: "),
        (pb.Sampling(json_schema="x" * 65_537), "65537 bytes"),
        (pb.Sampling(json_schema='{"a":'), "not JSON"),
        (pb.Sampling(regex="(a"), "unclosed group"),
        (pb.Sampling(lark="start: missing"), "missing"),
        (pb.Sampling(choices=pb.Choices(texts=["a", "a"])), "text 1 twice"),
        (pb.Sampling(json_object=False), "must be true"),
        (pb.Sampling(json_object=True, ignore_eos=True), "ignore_eos"),
    ],
)
async def test_a_form_that_cannot_be_enforced_is_rejected_with_the_field_and_the_place(
    sampling: pb.Sampling, words: str
) -> None:
    async with running_tier([EchoEngine()]) as tier:
        for _ in range(2):  # the second time, the grammar is known
            with pytest.raises(errors.InvalidSampling) as caught:
                await collect(tier.client, pb.GenerateRequest(prompt="x", sampling=sampling))
            assert words in caught.value.message
            assert caught.value.field == f"sampling.{sampling.WhichOneof('structured')}"
        assert not waiting(tier)


@pytest.mark.parametrize("choice", [None, pb.ToolChoice(name="second")])
async def test_a_problem_in_the_parameters_of_a_tool_names_the_tool(choice: pb.ToolChoice | None) -> None:
    tools = [
        pb.Tool(name="first", parameters=OBJECT),
        pb.Tool(name="second", parameters='{"type": "object", "properties": {"v": {"uniqueItems": true}}}'),
    ]
    talk = pb.Chat(messages=[pb.Message(role="user", content="hi")], tools=tools, tool_choice=choice)
    async with running_tier([EchoEngine()]) as tier:
        with pytest.raises(errors.InvalidRequest) as caught:
            await collect(tier.client, pb.GenerateRequest(chat=talk))

    assert caught.value.field == "chat.tools[1].parameters"
    assert "at /properties/v/uniqueItems: " in caught.value.message


@pytest.mark.parametrize("kind", ["structured", "tools"])
async def test_a_tier_without_grammars_rejects_them_so_that_the_router_tries_another(kind: str) -> None:
    asked = pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="user", content="hi")]))
    if kind == "tools":
        asked.chat.tools.add(name="get")
    else:
        asked.sampling.json_object = True
    async with running_tier([PlainEngine()]) as tier:
        with pytest.raises(errors.InvalidSampling) as caught:
            await collect(tier.client, asked)

    assert caught.value.fields[errors.FEATURE] == "structured"
    assert caught.value.field == ("chat.tools" if kind == "tools" else "sampling.json_object")


async def test_an_answer_has_its_form() -> None:
    async with running_tier([EchoEngine()]) as tier:
        answer = await collect(tier.client, choosing("yes, indeed"))

    assert answer.text == "yes, indeed"


async def test_requests_without_a_grammar_and_known_grammars_wait_for_no_check(gate: Gate) -> None:
    known = choosing("known")
    async with gated(gate) as tier:
        gate.open()
        await collect(tier.client, known)
        gate._gate.clear()
        blocked = ask(tier, choosing("unknown"))
        await eventually(lambda: len(gate.checked) == 2)

        assert (await collect(tier.client, pb.GenerateRequest(prompt="free"))).text == "free"
        assert (await collect(tier.client, known)).text == "known"
        assert not blocked.done()
        gate.open()
        assert (await blocked).text == "unknown"
        await eventually(lambda: not waiting(tier))


async def test_a_deadline_that_passes_during_a_check_ends_the_request(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gated(gate) as tier:
        blocked = ask(tier, choosing("first"))
        await eventually(lambda: len(gate.checked) == 1)
        monkeypatch.setattr(deadline, "DEADLINE_MARGIN", 57.0)  # only the batcher notices, after 3 s
        with pytest.raises(errors.DeadlineInQueue, match="grammar"):
            await ask(tier, choosing("late"), 60.0)
        monkeypatch.setattr(deadline, "DEADLINE_MARGIN", 0.02)
        assert waiting(tier) == 1
        gate.open()
        await blocked

    assert len(gate.checked) == 1, "a request that left is not checked"


async def test_a_cancelled_request_releases_its_place_and_is_not_checked(gate: Gate) -> None:
    async with gated(gate) as tier:
        blocked = ask(tier, choosing("first"))
        await eventually(lambda: len(gate.checked) == 1)
        gone = ask(tier, choosing("gone"))
        await eventually(lambda: waiting(tier) == 2)
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone
        await eventually(lambda: waiting(tier) == 1)
        gate.open()
        await blocked

    assert len(gate.checked) == 1


async def test_checks_count_against_the_limit_of_the_queue_and_may_be_shed(gate: Gate) -> None:
    async with gated(gate, queue_limit=2) as tier:
        (link,) = tier.batcher.coalescer.pool
        fit = 2 + link.free_slots(0.0)
        blocked = [ask(tier, choosing(f"text {number}", priority=5)) for number in range(fit)]
        await eventually(lambda: waiting(tier) == fit and len(gate.checked) == 1)

        with pytest.raises(errors.Overloaded):
            await ask(tier, choosing("no place", priority=5))
        urgent = ask(tier, choosing("urgent", priority=9))
        await eventually(lambda: any(task.done() for task in blocked))
        gate.open()
        outcomes = await asyncio.gather(*blocked, return_exceptions=True)
        assert (await urgent).text == "urgent"

    assert [type(outcome) for outcome in outcomes].count(errors.Shed) == 1
    assert sum(isinstance(outcome, Answer) for outcome in outcomes) == fit - 1


async def test_tenants_take_turns_at_the_check(gate: Gate) -> None:
    async with gated(gate) as tier:
        blocked = [ask(tier, choosing("first", tenant="flood"))]
        await eventually(lambda: len(gate.checked) == 1)
        blocked += [ask(tier, choosing(f"flood {number}", tenant="flood")) for number in range(20)]
        await eventually(lambda: waiting(tier) == 21)
        blocked.append(ask(tier, choosing("quiet", tenant="quiet")))
        await eventually(lambda: waiting(tier) == 22)
        gate.open()
        await asyncio.gather(*blocked)

    place = next(place for place, grammar in enumerate(gate.checked) if "quiet" in grammar)
    assert place < 15


def test_a_grammar_that_no_worker_accepts_is_rejected_with_its_field() -> None:
    dates = {f"date{number}": {"type": "string", "format": "date-time"} for number in range(500)}
    asked = pb.GenerateRequest()
    for number in range(16):
        asked.chat.tools.add(name=f"t{number}", parameters=json.dumps({"properties": dates}))

    with pytest.raises(errors.InvalidRequest, match="too large a grammar") as caught:
        GrammarCheck(ByteTokenizer()).form_of(asked, [1])

    assert caught.value.field == "chat.tools"
