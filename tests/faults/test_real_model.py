"""A worker dies during a real model's sampled answers, and the answers are byte-identical."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from headrace import models
from headrace.client import chat
from headrace.v1 import generation_pb2 as pb
from tests.faults.dice import Expected
from tests.faults.fleet import Fleet, Plan
from tests.faults.secured import connect
from tests.faults.tally import Row, until_affected, visit
from tests.harness import Answer, collect


def asking(seed: int) -> pb.GenerateRequest:
    request = chat("Tell a short story about a miller.", temperature=0.9, top_p=0.95, seed=seed)
    request.sampling.presence_penalty = 0.3
    request.sampling.repetition_penalty = 1.1
    request.sampling.max_tokens = 32
    request.sampling.ignore_eos = True
    request.stream.include_token_ids = True
    request.stream.include_route_changes = True
    return request


@pytest.mark.model
@pytest.mark.timeout(600)
async def test_a_sampled_answer_survives_its_worker(
    fleets: Callable[[Plan], AbstractAsyncContextManager[Fleet]], row: Callable[[str], Row]
) -> None:
    counted = row("SIGKILL of a worker, SmolLM2-135M, sampled")
    models.resolve(models.SMALL, models.cache_folder())
    plan = Plan(
        routers=1,
        batchers=1,
        worker_module="headrace.worker",
        worker_flags=("--model", models.SMALL, "--dtype", "float32", "--threads", "1"),
        batcher_flags=("--model", models.SMALL),
        start_seconds=300,  # kernels may have to be compiled, on a busy machine
    )
    asked = [asking(seed) for seed in (1, 2, 3, 4)]
    async with fleets(plan) as few, connect(few.target, retries=0) as client:
        whole = await asyncio.gather(*(collect(client, one, timeout=240) for one in asked))
        known = {one.sampling.seed: _expected(answer) for one, answer in zip(asked, whole, strict=True)}
        longest = 0

        def on_token(count: int) -> None:
            nonlocal longest
            longest = max(longest, count)

        for _ in until_affected(counted):
            await few.heal()
            longest = 0
            visits = [
                asyncio.create_task(
                    visit(client, one, timeout=240, on_token=on_token, judge=lambda asked, seed: known[seed])
                )
                for one in asked
            ]
            while longest < 12:
                await asyncio.sleep(0.01)
            await few.workers[0].kill()
            counted.add(await asyncio.gather(*visits))

    counted.check()
    assert counted.moved > 0, "the kill affected answers"
    assert len({answer.text for answer in whole}) == 4, "four seeds, four stories"


def _expected(answer: Answer) -> Expected:
    return Expected(answer.ids, answer.text, answer.finish.reason)
