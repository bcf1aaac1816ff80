"""How many tokens a chunk has under load."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from headrace import flushing
from headrace.flushing import chunk_tokens
from headrace.gateway.pace import Pace
from headrace.v1 import generation_pb2 as pb
from tests.gateway.fake_router import FakeRouter, edge


def test_each_token_is_a_chunk_until_there_are_thousands_per_second() -> None:
    assert [chunk_tokens(rate) for rate in (0, 100, 4_000, 4_001, 12_800, 1e9)] == [1, 1, 1, 2, 4, 32]


def test_the_rule_follows_the_tokens_of_all_answers() -> None:
    paced = Pace()

    paced.count(1)
    assert paced.flusher.tokens == 1
    paced.count(12_000)
    paced._updated = 0.0
    paced.count(1)

    assert paced.flusher.tokens > 1


async def test_tokens_are_gathered_after_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = FakeRouter._events

    async def slowly(*arguments: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        async for response in tokens(*arguments):
            await asyncio.sleep(0.01)
            yield response

    async with edge() as plain:
        await plain.chat(n=6)  # from now on, all calls share a stream
        monkeypatch.setattr(FakeRouter, "_events", slowly)
        assert len(parts(await plain.chat(stream=True))) == 4  # the emoji consists of two tokens
        monkeypatch.setattr(flushing, "CHUNKS_PER_SECOND", 0.5)
        await plain.chat()  # updates the rule
        gathered = parts(await plain.chat(stream=True))

    assert gathered == ["Hello", " 🚀\n"]


def parts(response: httpx.Response) -> list[str]:
    """Return the texts of the chunks of a stream."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if "content" in line]
    texts = [json.loads(line)["choices"][0]["delta"].get("content") for line in lines]
    return [text for text in texts if text]
