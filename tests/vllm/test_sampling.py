"""Sampling at vLLM where it would count or draw in another way than the contract says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headrace.client import Client, chat
from headrace.v1 import generation_pb2 as pb
from tests.harness import Answer, collect

TIMEOUT = 600.0
TOKENS = 24


def request(resumed: list[int] | None = None, **sampling: Any) -> pb.GenerateRequest:
    made = chat("Name five rivers of Europe.", **{"max_tokens": TOKENS, "seed": 3, **sampling})
    made.stream.include_token_ids = True
    if resumed:
        made.resume.token_ids.extend(resumed)
        made.resume.attempt = 1
    return made


async def ask(client: Client, asked: pb.GenerateRequest) -> Answer:
    return await collect(client, asked, timeout=TIMEOUT)


@pytest.mark.parametrize(
    "penalties",
    [
        {"presence_penalty": 1.3, "frequency_penalty": 0.6},
        {"repetition_penalty": 1.3, "frequency_penalty": -0.4, "min_tokens": 20},
    ],
    ids=str,
)
async def test_penalties_count_resumed_tokens_as_a_part_of_the_answer(
    client: Client, penalties: dict[str, Any]
) -> None:
    whole = await ask(client, request(temperature=0.0, **penalties))
    cuts = (1, 8, TOKENS // 2)

    rests = await asyncio.gather(
        *(ask(client, request(whole.ids[:cut], temperature=0.0, **penalties)) for cut in cuts)
    )

    assert [rest.ids for rest in rests] == [whole.ids[cut:] for cut in cuts]


async def test_temperatures_that_vllm_refuses_are_served(client: Client) -> None:
    """And a token that is the only one which min_p keeps is drawn at any temperature."""
    likeliest = await ask(client, request(temperature=0.0))
    hot = await ask(client, request(temperature=9.0))
    bounded = await ask(client, request(temperature=9.0, min_p=1.0))

    assert hot.tokens == TOKENS
    assert hot.ids != likeliest.ids == bounded.ids
