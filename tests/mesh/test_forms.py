"""Answers in a form and calls of tools through a whole mesh with echo engines, which follow grammars too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest

from headrace import errors
from headrace.batcher.__main__ import batcher
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.client import Client, chat, connect, gather, tool, tool_result
from headrace.router.__main__ import router
from headrace.router.settings import Settings as RouterSettings
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt, running_mesh, running_worker

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ROME = '{"city": "Röme 🚀", "days": 3}'
TOOLS = [tool("weather", "Returns the weather.", CITY), tool("clock", "Returns the time.")]


def written(*calls: tuple[str, str]) -> str:
    """Return calls as the model of the echo engine writes them."""
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    )


BOTH = written(("weather", ROME), ("clock", "{}"))


def calling(text: str = BOTH, **sampling: Any) -> pb.GenerateRequest:
    request = chat(text, tools=TOOLS, seed=5, **sampling)
    request.stream.include_token_ids = True
    return request


def named(calls: Sequence[pb.ToolCall]) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize(
    ("sampling", "said", "answer"),
    [
        ({"json_schema": json.dumps(CITY)}, ROME, ROME),
        ({"json_object": True}, '{"a": [1, null]}', '{"a": [1, null]}'),
        ({"regex": "(ab)+c"}, "ababc", "ababc"),
        ({"choices": pb.Choices(texts=["yes", "no"])}, "no", "no"),
        ({"lark": 'start: "a" DIGIT+\nDIGIT: /[0-9]/'}, "a12", "a12"),
    ],
)
async def test_an_answer_has_the_form_that_was_asked_for(
    mesh: Mesh, sampling: dict[str, Any], said: str, answer: str
) -> None:
    """The echo engine repeats the prompt as far as the form allows it."""
    in_form = await collect(mesh.client, prompt(said, **sampling))
    other = await collect(mesh.client, prompt("?!" + said, **sampling, max_tokens=200))

    assert (in_form.text, in_form.finish.reason) == (answer, pb.FINISH_REASON_STOP)
    assert not other.text.startswith("?!"), "the prompt has not the form"
    await eventually(lambda: not mesh.left_behind)


async def test_calls_arrive_apart_from_the_text(mesh: Mesh) -> None:
    answer = await collect(mesh.client, calling("Let me look." + BOTH))

    assert answer.text.strip() == "Let me look."
    assert named(answer.calls) == [("weather", ROME), ("clock", "{}")]
    assert len({call.id for call in answer.calls}) == 2
    assert answer.finish.reason == pb.FINISH_REASON_STOP


async def test_the_choice_of_tools_is_kept(mesh: Mesh) -> None:
    required, one, none = calling("Hello!"), calling("Hello!"), calling()
    required.chat.tool_choice.mode = pb.TOOL_MODE_REQUIRED
    one.chat.tool_choice.name = "clock"
    none.chat.tool_choice.mode = pb.TOOL_MODE_NONE
    free = calling("Hello!")
    single = calling()
    single.chat.parallel_tool_calls = False

    assert (await collect(mesh.client, required)).calls
    assert named((await collect(mesh.client, one)).calls) == [("clock", "{}")]
    unmarked = await collect(mesh.client, none)
    assert (unmarked.text, unmarked.calls) == (BOTH, [])
    assert (await collect(mesh.client, free)).text == "Hello!"
    assert len((await collect(mesh.client, single)).calls) == 1


async def test_a_conversation_continues_with_results_of_calls(mesh: Mesh) -> None:
    reply = await mesh.client.ask(calling(), timeout=PATIENCE)
    turns = [pb.Message(role="user", content="?"), reply.message, *(tool_result(c, "!") for c in reply.calls)]

    answer = await collect(mesh.client, chat(turns, tools=TOOLS))

    assert answer.text == "!"
    assert 0 <= answer.accepted.score <= 1


async def test_a_caller_resumes_after_any_delta_of_a_call() -> None:
    """Each call has the same id in all streams, and each part arrives once."""
    request = calling("Go. " + BOTH)
    request.stream.flush_tokens = 1
    async with running_mesh(engine=lambda: EchoEngine(step_seconds=0.002)) as mesh:
        events = [event async for event in mesh.client.generate(request, timeout=PATIENCE)]
        whole = await gather(_stream(events))
        cuts = [place for place, event in enumerate(events) if event.delta.token_count]
        assert len(cuts) > 50
        for cut in cuts:
            ids = [id for event in events[: cut + 1] for id in event.delta.token_ids]
            request.resume.CopyFrom(pb.Resume(token_ids=ids, attempt=1))
            rest = [event async for event in mesh.client.generate(request, timeout=PATIENCE)]
            joined = await gather(_stream([*events[: cut + 1], *rest]))

            assert (joined.text, joined.calls) == (whole.text, whole.calls)
        assert named(whole.calls) == [("weather", ROME), ("clock", "{}")]


async def _stream(events: Sequence[pb.GenerateResponse]) -> Any:
    for event in events:
        yield event


@pytest.mark.parametrize("multiplex", [False, True])
async def test_many_calls_at_once_are_neither_lost_nor_mixed_up(multiplex: bool) -> None:
    cities = [f'{{"city": "{"x" * (number % 23)}", "days": {number}}}' for number in range(48)]
    async with running_mesh(client_options={"multiplex": multiplex}) as mesh:
        answers = await asyncio.gather(
            *(collect(mesh.client, calling(written(("weather", city)))) for city in cities)
        )

    assert [named(answer.calls) for answer in answers] == [[("weather", city)] for city in cities]
    assert len({answer.calls[0].id for answer in answers}) == len(cities)


@pytest.mark.parametrize("multiplex", [False, True])
async def test_a_slow_reader_receives_whole_calls(multiplex: bool) -> None:
    """Parts are gathered while it does not read."""
    text = written(*(("weather", f'{{"city": "{"y" * 40}", "days": {number}}}') for number in range(8)))
    async with running_mesh(
        client_options={"multiplex": multiplex}, batcher_settings={"max_unread_tokens": 64}
    ) as mesh:
        seen: list[pb.GenerateResponse] = []
        async with aclosing(mesh.client.generate(calling(text), timeout=PATIENCE)) as stream:
            async for event in stream:
                seen.append(event)
                await asyncio.sleep(0.002)
        reply = await gather(_stream(seen))

    assert [json.loads(call.arguments)["days"] for call in reply.calls] == list(range(8))


async def test_a_call_moves_to_another_batcher_at_any_token() -> None:
    """The second batcher of the tier continues the call of the first one: two batchers, one worker each."""
    async with AsyncExitStack() as stack:
        batchers = []
        for _ in range(2):
            worker = await stack.enter_async_context(running_worker(EchoEngine(step_seconds=0.002)))
            settings = BatcherSettings(
                port=0, tier="t", workers=f"127.0.0.1:{worker.server.port}", fake=True, drain_seconds=0.05
            )
            leaving = await stack.enter_async_context(AsyncExitStack())
            running = await leaving.enter_async_context(batcher(settings, ByteTokenizer(), "b"))
            batchers.append((running, leaving))
        targets = "+".join(f"127.0.0.1:{running.server.port}" for running, _ in batchers)
        front = await stack.enter_async_context(
            router(RouterSettings(port=0, tiers=f"t={targets}", poll_seconds=0.05, drain_seconds=1.0))
        )
        client: Client = await stack.enter_async_context(connect(f"127.0.0.1:{front.port}"))
        await eventually(lambda: front.health.ready)
        async with asyncio.timeout(PATIENCE):
            while sum(seen.ready for seen in (await client.inspect()).router.batchers) < 2:
                await asyncio.sleep(0.02)
        request = calling("Go. " + BOTH)
        request.stream.include_route_changes = True
        request.stream.flush_tokens = 1
        seen: list[pb.GenerateResponse] = []
        async with aclosing(client.generate(request, timeout=PATIENCE)) as answer:
            async for event in answer:
                seen.append(event)
                if len(seen) == 60:
                    busy = next(pair for pair in batchers if pair[0].coalescer.live)
                    await busy[1].aclose()
        reply = await gather(_stream(seen))

    assert any(event.HasField("route_change") for event in seen), "it moved"
    assert [(call.name, call.arguments) for call in reply.calls] == [("weather", ROME), ("clock", "{}")]


async def test_a_form_that_cannot_be_enforced_is_rejected_with_its_place(mesh: Mesh) -> None:
    for request, field in (
        (prompt("x", json_schema='{"type": "strin"}'), "sampling.json_schema"),
        (prompt("x", json_schema="{"), "sampling.json_schema"),
        (prompt("x", regex="(a"), "sampling.regex"),
        (prompt("x", lark="start: ("), "sampling.lark"),
        (prompt("x", choices=pb.Choices()), "sampling.choices"),
        (prompt("x", json_object=True, ignore_eos=True, max_tokens=9), "sampling.json_object"),
    ):
        with pytest.raises(errors.InvalidSampling) as raised:
            await collect(mesh.client, request)
        assert raised.value.field.startswith(field), raised.value


async def test_an_engine_without_grammars_leaves_the_request_to_another_tier() -> None:
    """Both tiers are of the same kind: the first worker reports that it cannot."""

    class Old(EchoEngine):
        def __init__(self) -> None:
            super().__init__()
            features = [each for each in self._model.features if each != "structured"]
            self._model = type(self._model)(**{**_fields(self._model), "features": tuple(features)})

    engines = iter([Old(), EchoEngine()])
    async with running_mesh(engine=lambda: next(engines)) as mesh:
        answer = await collect(mesh.client, chat("{}", json_object=True))
        pinned = chat("{}", json_object=True)
        pinned.routing.tier = "small"
        with pytest.raises(errors.InvalidSampling, match="structured"):
            await collect(mesh.client, pinned)

    assert (answer.accepted.tier, answer.text) == ("large", "{}")


def _fields(model: Any) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.__dataclass_fields__}
