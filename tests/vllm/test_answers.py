"""Answers of a whole mesh whose worker runs vLLM, as callers of the router get them."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from headrace import errors
from headrace.client import Client, chat
from headrace.v1 import generation_pb2 as pb
from tests.harness import Answer, collect, prompt
from tests.vllm.conftest import CONTEXT, TIER, Served

TIMEOUT = 600.0
TEXT = "The miller opened the gate, and the water"


def greedy(text: str = TEXT, **sampling: Any) -> pb.GenerateRequest:
    return prompt(text, **{"temperature": 0.0, "max_tokens": 24, **sampling})


async def ask(client: Client, request: pb.GenerateRequest) -> Answer:
    return await collect(client, request, timeout=TIMEOUT)


async def test_the_tier_is_listed_with_the_model_and_its_limits(client: Client, folder: Path) -> None:
    (tier,) = (await client.list_tiers()).tiers

    assert (tier.name, tier.healthy) == (TIER, True)
    assert tier.model == str(folder)
    assert tier.limits.context_length == CONTEXT


async def test_a_chat_is_answered_by_the_model(client: Client) -> None:
    answer = await ask(client, chat("What is the capital of France?", temperature=0, max_tokens=24))

    assert "Paris" in answer.text
    assert answer.accepted.tier == TIER
    assert answer.finish.reason == pb.FINISH_REASON_STOP, "the model ended its turn"
    assert "<|im_end|>" not in answer.text
    assert answer.finish.usage.completion_tokens == answer.tokens


async def test_max_tokens_ends_the_answer_and_eos_can_be_ignored(client: Client) -> None:
    short = await ask(client, greedy(max_tokens=5))
    request = chat("Say hello.", temperature=0, max_tokens=60, ignore_eos=True)
    long = await ask(client, request)

    assert (short.tokens, short.finish.reason) == (5, pb.FINISH_REASON_LENGTH)
    assert (long.tokens, long.finish.reason) == (60, pb.FINISH_REASON_LENGTH)


async def test_min_tokens_keeps_the_model_from_ending_its_turn(client: Client) -> None:
    usual = await ask(client, chat("Say hello.", temperature=0, max_tokens=60))
    longer = await ask(client, chat("Say hello.", temperature=0, max_tokens=60, min_tokens=usual.tokens + 5))

    assert usual.finish.reason == pb.FINISH_REASON_STOP
    assert longer.tokens >= usual.tokens + 5


async def test_a_stop_text_across_token_borders_ends_the_answer_before_it(client: Client) -> None:
    whole = (await ask(client, greedy())).text
    middle = len(whole) // 2
    stop = whole[middle : middle + 6]
    answer = await ask(client, greedy(stop=[stop]))

    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish.reason == pb.FINISH_REASON_STOP_SEQUENCE
    assert answer.finish.stop_sequence == stop


async def test_a_seed_repeats_a_sampled_answer_and_another_gives_another(client: Client) -> None:
    def sampled(seed: int) -> pb.GenerateRequest:
        return prompt(TEXT, temperature=1.0, top_p=0.95, seed=seed, max_tokens=24)

    first, again, other = [await ask(client, sampled(seed)) for seed in (7, 7, 8)]

    assert first.ids == again.ids
    assert first.ids != other.ids
    assert first.accepted.seed == 7


async def test_penalties_and_bias_change_the_tokens(client: Client) -> None:
    usual = await ask(client, greedy())
    request = greedy()
    request.sampling.logit_bias[usual.ids[0]] = -100
    biased = await ask(client, request)
    text = "no no no no no no no no no"
    repetitive = await ask(client, greedy(text))
    penalised = await ask(client, greedy(text, presence_penalty=2, frequency_penalty=2))

    assert biased.ids[0] != usual.ids[0]
    assert len(set(penalised.ids)) > len(set(repetitive.ids))


async def test_details_of_the_tokens_of_prompt_and_answer(client: Client) -> None:
    answer = await ask(client, greedy(top_logprobs=3, prompt_logprobs=2))

    assert len(answer.details) == answer.tokens
    assert b"".join(one.token.text for one in answer.details).decode() == answer.text
    assert [one.top[0].id for one in answer.details] == answer.ids
    assert all(one.token.logprob <= 0 for one in answer.details)
    assert len(answer.prompt) == answer.accepted.prompt_tokens
    assert not answer.prompt[0].token.HasField("logprob")
    assert all(len(one.top) == 2 for one in answer.prompt[1:])


async def test_concurrent_answers_are_those_of_each_prompt_alone(client: Client) -> None:
    """64 at a time, four times as many as run together, with prompts of different lengths."""
    requests = [
        greedy(f"Story {number}. {'It rained. ' * (number % 9)}{TEXT}", max_tokens=8 + number % 12)
        for number in range(64)
    ]
    together = await asyncio.gather(*(ask(client, request) for request in requests))
    alone = [await ask(client, request) for request in requests[::8]]

    assert [one.tokens for one in together] == [8 + number % 12 for number in range(64)]
    assert [one.ids for one in together[::8]] == [one.ids for one in alone]
    assert [one.text for one in together[::8]] == [one.text for one in alone]


async def test_the_tokens_are_those_of_transformers(client: Client, folder: Path) -> None:
    requests = [
        greedy(),
        greedy("def add(a, b):"),
        chat("Why is the sky blue?", temperature=0, max_tokens=24),
    ]
    for request in requests:
        request.stream.include_token_ids = True
    answers = [await ask(client, request) for request in requests]

    expected = await asyncio.to_thread(drawn, folder, requests, [one.ids for one in answers])

    assert [one.ids for one in answers] == expected


def drawn(folder: Path, requests: list[pb.GenerateRequest], answers: list[list[int]]) -> list[list[int]]:
    """Return the likeliest token after each part of an answer, by one pass over prompt and answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    every = []
    for request, ids in zip(requests, answers, strict=True):
        if request.prompt:
            before = tokenizer(request.prompt)["input_ids"]
        else:
            turns = [{"role": turn.role, "content": turn.content} for turn in request.chat.messages]
            before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            logits = network(torch.tensor([[*before, *ids]])).logits[0]
        every.append(logits[len(before) - 1 : -1].argmax(-1).tolist())
    return every


async def test_a_repeated_prompt_is_cached(client: Client) -> None:
    text = "A prompt of several blocks, which no other test sends, and which is sent twice here. " * 5
    first, again = [await ask(client, greedy(text, max_tokens=4)) for _ in range(2)]

    assert first.finish.usage.cached_tokens == 0
    assert again.finish.usage.cached_tokens > 0
    assert again.ids == first.ids


async def test_a_cancelled_answer_leaves_nothing_behind(client: Client, served: Served) -> None:
    request = greedy(ignore_eos=True, max_tokens=600)
    async with aclosing(client.generate(request, timeout=TIMEOUT)) as stream:
        async for response in stream:
            if response.HasField("delta"):
                break
    await served.fleet.quiet()
    state = (await served.worker.inspect()).worker

    assert state.load.running == state.load.waiting == 0


async def test_an_answer_that_misses_its_deadline_is_reported(client: Client, served: Served) -> None:
    """While it is decoded, or before that, once the pace is known."""
    with pytest.raises(errors.DeadlineExceeded):
        await collect(client, greedy(ignore_eos=True, max_tokens=900), timeout=2.0)
    await served.fleet.quiet()


async def test_a_prompt_beyond_the_context_is_refused(client: Client) -> None:
    with pytest.raises(errors.ContextTooLong):
        await ask(client, greedy("word " * (CONTEXT + 10)))


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "inhabitants": {"type": "integer"}},
    "required": ["city", "inhabitants"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_schema_is_kept(client: Client, temperature: float) -> None:
    request = chat("Describe Paris.", temperature=temperature, seed=5, max_tokens=80)
    request.sampling.json_schema = json.dumps(CITY)

    answer = await ask(client, request)

    assert answer.finish.reason == pb.FINISH_REASON_STOP
    jsonschema.validate(json.loads(answer.text), CITY)


async def test_a_regex_and_a_choice_are_kept_beside_free_answers(client: Client) -> None:
    date = chat("When?", temperature=1, seed=1, max_tokens=20, regex="[0-9]{4}-[0-9]{2}-[0-9]{2}")
    choice = chat("Yes or no?", temperature=1, seed=1, max_tokens=20)
    choice.sampling.choices.texts.extend(["yes", "no", "perhaps"])
    free = greedy()

    dated, chosen, whatever = await asyncio.gather(*(ask(client, one) for one in (date, choice, free)))

    assert [len(part) for part in dated.text.split("-")] == [4, 2, 2]
    assert chosen.text in ("yes", "no", "perhaps")
    assert whatever.ids == (await ask(client, free)).ids


async def test_an_answer_is_resumed_after_the_tokens_that_were_delivered(client: Client) -> None:
    whole = await ask(client, greedy(seed=1))
    for cut in (1, 9, 23):
        again = greedy(seed=1)
        again.resume.token_ids.extend(whole.ids[:cut])
        again.resume.attempt = 1
        rest = await ask(client, again)

        assert rest.ids == whole.ids[cut:]
        assert whole.text.endswith(rest.text)
        assert rest.finish.usage.replayed_tokens == cut
