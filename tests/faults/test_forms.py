"""Services die within JSON and calls of tools: texts, ids of calls and arguments are byte-identical."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import pytest

from headrace import models
from headrace.client import Client, chat, tool
from headrace.v1 import generation_pb2 as pb
from tests.faults.dice import Expected
from tests.faults.fleet import Child, Fleet, Plan
from tests.faults.secured import connect
from tests.faults.tally import Row, until_affected, visit
from tests.harness import Answer, collect

Fleets = Callable[[Plan], AbstractAsyncContextManager[Fleet]]

# Any characters, so that some tokens end within one: their text is held back.
ORDER = {
    "type": "object",
    "properties": {
        "item": {"type": "string", "maxLength": 20},
        "sizes": {"type": "array", "items": {"enum": ["S", "M", "L"]}, "minItems": 1, "maxItems": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["item", "sizes", "count"],
    "additionalProperties": False,
}
TOOLS = [tool("order", "Orders something.", ORDER), tool("cancel", "Cancels the order.")]


def in_forms(rng: random.Random, count: int) -> list[pb.GenerateRequest]:
    """Return requests for JSON, for a text of a pattern and for calls, half of them sampled."""
    made = []
    for number in range(count):
        text = f"{number} " + "".join(rng.choices("abcdefgh ", k=20))
        request = chat(text, max_tokens=120, seed=rng.getrandbits(63), temperature=number % 2)
        match number // 2 % 4:
            case 0:
                request.sampling.json_schema = json.dumps(ORDER)
            case 1:
                request.sampling.regex = "([a-z]{2,8} ){4,12}(done|over)"
            case 2:
                request.chat.tools.extend(TOOLS)
                request.chat.tool_choice.mode = pb.TOOL_MODE_REQUIRED
            case _:
                request.chat.tools.extend(TOOLS)
                request.chat.tool_choice.name = "order"
        request.stream.include_token_ids = True
        request.stream.include_route_changes = True
        made.append(request)
    return made


def expected(answer: Answer) -> Expected:
    calls = tuple((call.id, call.name, call.arguments) for call in answer.calls)
    return Expected(answer.ids, answer.text, answer.finish.reason, calls, answer.reasoning)


async def fault_free(client: Client, asked: Sequence[pb.GenerateRequest]) -> dict[int, Expected]:
    """Return the answers without a fault, by seed."""
    answers = await asyncio.gather(*(collect(client, one, timeout=240) for one in asked))
    return {one.sampling.seed: expected(answer) for one, answer in zip(asked, answers, strict=True)}


async def faulted(
    client: Client,
    asked: Sequence[pb.GenerateRequest],
    known: dict[int, Expected],
    counted: Row,
    kill: Callable[[], object],
    *,
    tokens: int,
) -> None:
    """Send all requests, and call *kill* when the longest answer has so many *tokens*."""
    longest = 0

    def on_token(count: int) -> None:
        nonlocal longest
        longest = max(longest, count)

    visits = [
        asyncio.create_task(
            visit(client, one, timeout=240, on_token=on_token, judge=lambda request, seed: known[seed])
        )
        for one in asked
    ]
    while longest < tokens and not all(each.done() for each in visits):
        await asyncio.sleep(0.002)
    await kill()  # type: ignore[misc]
    counted.add(await asyncio.gather(*visits))


@pytest.mark.parametrize("service", ["worker", "batcher", "router"])
async def test_a_service_that_is_killed_within_json_and_calls(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random, service: str
) -> None:
    counted = row(f"SIGKILL of a {service}: JSON, patterns and calls")
    asked = in_forms(rng, 24)

    async def victim() -> Child:
        match service:
            case "worker":
                return rng.choice(twins.workers)
            case "batcher":
                return await twins.busiest_batcher()
            case _:
                return await twins.busiest_router()

    async def kill() -> None:
        await (await victim()).kill()

    async with connect(twins.target) as client:
        known = await fault_free(client, asked)
        for _ in until_affected(counted, 5):
            await twins.heal()
            await faulted(client, asked, known, counted, kill, tokens=rng.randint(5, 40))

    counted.check()
    assert counted.moved >= 5, "the kills affected answers"
    assert {len(whole.calls) for whole in known.values()} >= {0, 1}
    texts = [known[one.sampling.seed] for one in asked if one.sampling.HasField("json_schema")]
    assert all(json.loads(whole.text) for whole in texts if whole.reason == pb.FINISH_REASON_STOP)
    assert any(whole.reason == pb.FINISH_REASON_STOP for whole in texts)


async def test_rows_that_cannot_be_sampled_continue_in_their_form_on_another_worker(
    fleets: Fleets, row: Callable[[str], Row], rng: random.Random
) -> None:
    counted = row("every 89th row of each worker is NaN: JSON, patterns and calls")
    plan = Plan(workers=2, batchers=1, routers=1)
    asked = in_forms(rng, 24)
    async with fleets(plan) as few, connect(few.target, retries=0) as client:
        known = await fault_free(client, asked)
    faulty = replace(plan, worker_flags=(*plan.worker_flags, "--faults", "nan_row=89"))
    async with fleets(faulty) as few, connect(few.target, retries=0) as client:
        visits = await asyncio.gather(
            *(visit(client, one, judge=lambda request, seed: known[seed]) for one in asked)
        )
        counted.add(visits, may=["SEQUENCE_FAULT"])
        await few.quiet()

    counted.check()
    assert counted.moved > 3, "the faults affected answers"
    assert counted.outcomes["SEQUENCE_FAULT"] < counted.moved, "most of them were hidden"


@pytest.mark.model
@pytest.mark.timeout(900)
async def test_a_real_models_json_and_calls_survive_a_worker(
    fleets: Fleets, row: Callable[[str], Row]
) -> None:
    counted = row("SIGKILL of a worker, SmolLM2-135M: JSON and calls, greedy and sampled")
    models.resolve(models.SMALL, models.cache_folder())
    plan = Plan(
        routers=1,
        batchers=1,
        worker_module="headrace.worker",
        worker_flags=("--model", models.SMALL, "--dtype", "float32", "--threads", "1"),
        batcher_flags=("--model", models.SMALL),
        start_seconds=300,  # kernels may have to be compiled, on a busy machine
    )
    asked = []
    for seed in range(8):
        request = chat("I want three red shirts.", temperature=0.9 * (seed % 2), seed=seed, max_tokens=48)
        if seed % 4 < 2:
            request.sampling.json_schema = json.dumps(ORDER)
        else:
            request.chat.tools.extend(TOOLS)
            request.chat.tool_choice.mode = pb.TOOL_MODE_REQUIRED
        request.stream.include_token_ids = True
        request.stream.include_route_changes = True
        asked.append(request)
    async with fleets(plan) as few, connect(few.target, retries=0) as client:
        known = await fault_free(client, asked)
        for _ in until_affected(counted):
            await few.heal()
            await faulted(client, asked, known, counted, few.workers[0].kill, tokens=10)

    counted.check()
    assert counted.moved > 0, "the kill affected answers"
    assert all(known[seed].calls for seed in (2, 3, 6, 7))
    assert known[1] != known[5], "two seeds, two answers"
