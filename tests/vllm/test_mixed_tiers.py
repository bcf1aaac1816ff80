"""A tier with vLLM beside a tier with our engine, in one mesh: callers cannot tell the engines apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from headrace import models
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import Client, chat
from headrace.v1 import generation_pb2 as pb
from tests.faults.fleet import HOST, Child, started
from tests.faults.secured import connect
from tests.harness import collect, until_healthy
from tests.vllm.conftest import START_SECONDS, Served

TIMEOUT = 600.0


@pytest.fixture(scope="module")
async def mixed(
    served: Served, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Client, None]:
    """Return a client of a router with two tiers; "large" is the worker with vLLM that all tests share."""
    logs = tmp_path_factory.mktemp("mixed")
    with reserved_ports(4) as (worker, small, large, router):

        def child(name: str, module: str, port: int, *flags: str) -> Child:
            return Child(name, f"headrace.{module}", flags, port, logs / f"{name}.log")

        ours = ("--model", models.SMALL)
        tiers = f"small={HOST}:{small},large={HOST}:{large}"
        children = [
            child("worker", "worker", worker, *ours, "--dtype", "float32", "--threads", "1"),
            child("batcher1", "batcher", small, "--tier", "small", "--workers", f"{HOST}:{worker}", *ours),
            child(
                *("batcher2", "batcher", large, "--tier", "large"),
                *("--workers", served.worker.address, "--model", str(folder)),
            ),
            child("router", "router", router, "--tiers", tiers),
        ]
        async with started(children, seconds=START_SECONDS), connect(children[-1].address) as client:
            await until_healthy(client)
            yield client


def asking(text: str, tier: str = "") -> pb.GenerateRequest:
    request = chat(text, temperature=0, max_tokens=24)
    request.routing.tier = tier
    request.stream.include_token_ids = True
    return request


async def test_the_router_chooses_between_the_engines_by_difficulty(mixed: Client) -> None:
    easy = await collect(mixed, asking("Hi!"), timeout=TIMEOUT)
    hard = await collect(
        mixed, asking("Write a Python function that implements a binary search tree."), timeout=TIMEOUT
    )

    assert (easy.accepted.tier, hard.accepted.tier) == ("small", "large")
    assert easy.text
    assert hard.text


async def test_both_engines_answer_alike(mixed: Client) -> None:
    """They run the same model, with weights that are rounded differently."""
    question = "What is the capital of France?"
    small, large = await asyncio.gather(
        *(collect(mixed, asking(question, tier), timeout=TIMEOUT) for tier in ("small", "large"))
    )

    assert "Paris" in small.text
    assert "Paris" in large.text
    assert small.accepted.prompt_tokens == large.accepted.prompt_tokens
    assert small.finish.usage.prompt_tokens == large.finish.usage.prompt_tokens
