"""The default models through all processes give the tokens of transformers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from headrace import models
from headrace.cli.launch.mesh import Running
from headrace.client import Client, chat, connect
from headrace.v1 import generation_pb2 as pb
from tests.harness import Answer, collect, transformers_tokenizer

# Hundreds of tokens by real models: half a minute, and many times that on a busy machine.
pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]

TOKENS = 16


def requests() -> list[pb.GenerateRequest]:
    lines = resources.files("headrace.cli.demo").joinpath("demo_prompts.jsonl").read_text().splitlines()
    made = [chat(json.loads(line)["prompt"], temperature=0, max_tokens=TOKENS) for line in lines]
    for request in made:
        request.stream.include_token_ids = True
    return made


@pytest.fixture(scope="module")
async def client(real_mesh: Running) -> AsyncGenerator[Client, None]:
    async with connect(real_mesh.address) as client:
        yield client


@pytest.fixture(scope="module")
async def alone(client: Client) -> list[Answer]:
    """Return the answers of the prompts, sent one at a time."""
    return [await collect(client, request, timeout=1200) for request in requests()]


def drawn(model_name: str, answers: list[tuple[pb.GenerateRequest, Answer]]) -> list[list[int]]:
    """Return the ids that transformers draws greedily with the same weights, end of turn left out.

    One forward pass over prompt and answer gives the id after each position. As far as these are the ids of
    the answer, they are those that `generate` draws one by one, which takes ten times as long.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from headrace.worker.engine.load.gguf.weights import dequantised

    cache = models.cache_folder()
    path: Path = models.resolve(model_name, cache)
    folder = dequantised(path, digest=models.file_digest(path), cache=cache, progress=lambda stage: None)
    tokenizer = transformers_tokenizer(path, cache)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = (tokenizer.eos_token_id, network.config.eos_token_id)
    every = []
    for request, answer in answers:
        turns = [{"role": turn.role, "content": turn.content} for turn in request.chat.messages]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            logits = network(torch.tensor([[*prompt, *answer.ids]])).logits[0]
        ids = logits[len(prompt) - 1 :].argmax(-1).tolist()
        # An answer of TOKENS ids ends there, and a shorter one with the end of the turn.
        every.append(ids[:-1] if len(answer.ids) == TOKENS or ids[-1] in ends else ids)
    return every


async def test_there_are_sixteen_prompts_and_both_tiers_answer_some(alone: list[Answer]) -> None:
    assert len(alone) == 16
    assert {answer.accepted.tier for answer in alone} == {"small", "large"}
    assert all(answer.text.strip() for answer in alone)


async def test_all_at_once_gives_the_same_tokens_as_one_at_a_time(
    client: Client, alone: list[Answer]
) -> None:
    together = await asyncio.gather(*(collect(client, request, timeout=1200) for request in requests()))

    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


@pytest.mark.parametrize(("tier", "model"), [("small", models.SMALL), ("large", models.LARGE)])
async def test_the_tokens_are_those_of_transformers(alone: list[Answer], tier: str, model: str) -> None:
    mine = [
        (request, answer)
        for request, answer in zip(requests(), alone, strict=True)
        if answer.accepted.tier == tier
    ]

    expected = await asyncio.to_thread(drawn, model, mine)

    assert [answer.ids for _, answer in mine] == expected


def likelihoods(model_name: str, ids: list[int]) -> Any:
    """Return the log-probabilities of all tokens after each of *ids*, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from headrace.worker.engine.load.gguf.weights import dequantised

    cache = models.cache_folder()
    path = models.resolve(model_name, cache)
    folder = dequantised(path, digest=models.file_digest(path), cache=cache, progress=lambda stage: None)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return network(torch.tensor([ids])).logits[0].log_softmax(-1)


async def test_details_of_tokens_are_those_of_transformers(client: Client) -> None:
    text = "What is the capital of France? Réponds en français, s'il te plaît. 🗼"
    request = chat(text, temperature=0, max_tokens=8, top_logprobs=3, prompt_logprobs=2)
    request.stream.include_token_ids = True
    request.routing.tier = "small"
    answer = await collect(client, request, timeout=1200)

    described = answer.prompt + answer.details
    ids = [one.token.id for one in described]
    expected = await asyncio.to_thread(likelihoods, models.SMALL, ids)

    assert len(answer.prompt) == answer.accepted.prompt_tokens
    assert text.encode() in b"".join(one.token.text for one in answer.prompt)
    assert b"".join(one.token.text for one in answer.details).decode() == answer.text
    assert not described[0].token.HasField("logprob")
    for row, one in zip(expected, described[1:], strict=False):
        most = len(one.top)
        assert one.token.logprob == pytest.approx(float(row[one.token.id]), abs=1e-3)
        assert [top.logprob for top in one.top] == pytest.approx(row.topk(most).values.tolist(), abs=1e-3)
        for top in one.top:
            assert top.logprob == pytest.approx(float(row[top.id]), abs=1e-3)
            if top.id == one.token.id:
                assert top.logprob == one.token.logprob, "bit for bit"
    assert {len(one.top) for one in answer.prompt[1:]} == {2}
    assert {len(one.top) for one in answer.details} == {3}


async def test_a_seeded_sample_is_repeatable_and_another_seed_differs(client: Client) -> None:
    def ask(seed: int) -> pb.GenerateRequest:
        request = chat(
            "Tell me a short story about a fox.", temperature=1.0, top_p=0.95, seed=seed, max_tokens=24
        )
        request.stream.include_token_ids = True
        request.routing.tier = "small"
        return request

    first, again, other = await asyncio.gather(
        *(collect(client, ask(seed), timeout=1200) for seed in (1, 1, 2))
    )

    assert first.ids == again.ids
    assert first.ids != other.ids


async def test_a_prompt_beyond_the_context_is_refused(client: Client) -> None:
    from headrace import errors

    (small, _) = (await client.list_tiers()).tiers
    request = chat("word " * (small.limits.context_length + 10))
    request.routing.tier = "small"

    with pytest.raises(errors.ContextTooLong, match="shorten"):
        await collect(client, request)
