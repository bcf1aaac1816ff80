"""With --exact, a worker with vLLM announces EXACT if its own check passes, and then keeps that promise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from headrace.client import Client, chat
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from tests.faults.fleet import fleet
from tests.faults.secured import connect
from tests.harness import Answer, collect
from tests.vllm.conftest import vllm_plan, worker_flags
from tests.vllm.test_run_stream import model

TIMEOUT = 600.0
TOKENS = 24
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 30, "presence_penalty": 0.8},
    {"temperature": 0.0},
]


@pytest.fixture(scope="module")
async def exact(
    python: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[tuple[Client, int], None]:
    """Run a worker; return a client of its router, and the worker's port."""
    plan = vllm_plan(python, folder, worker_flags=worker_flags(folder, "--exact"))
    logs = tmp_path_factory.mktemp("exact")
    async with fleet(plan, logs) as running, connect(running.target, retries=0) as client:
        yield client, running.workers[0].port


def request(number: int, resumed: list[int] | None = None) -> pb.GenerateRequest:
    made = chat(
        f"Tell story number {number} of a miller.",
        max_tokens=TOKENS,
        seed=2**63 + number,
        ignore_eos=True,
        **SAMPLING[number % len(SAMPLING)],
    )
    made.stream.include_token_ids = True
    if resumed:
        made.resume.token_ids.extend(resumed)
        made.resume.attempt = 1
    return made


async def ask(client: Client, asked: pb.GenerateRequest) -> Answer:
    return await collect(client, asked, timeout=TIMEOUT)


async def test_answers_are_bit_identical_alone_batched_and_resumed(exact: tuple[Client, int]) -> None:
    """In float32 on a CPU, where the check passes."""
    client, port = exact
    assert (await model(port)).determinism == wire.DETERMINISM_EXACT
    alone = [(await ask(client, request(number))).ids for number in range(16)]

    together = await asyncio.gather(*(ask(client, request(number)) for number in range(16)))
    resumed = await asyncio.gather(
        *(ask(client, request(number, alone[number][: 1 + number])) for number in range(16))
    )

    assert [answer.ids for answer in together] == alone
    assert [answer.ids for answer in resumed] == [ids[1 + number :] for number, ids in enumerate(alone)]
