"""Check at the start whether vLLM's answers are bit-identical alone, in a batch and resumed.

That depends on the device, the data type, the version of vLLM and VLLM_BATCH_INVARIANT, so it is measured
with the loaded model: only if no answer differs is the worker's determinism EXACT. Without vLLM itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import count
from typing import Any, Protocol

from headrace.worker.runner import SamplingParams, SequenceSpec

Ids = list[int]

_PROMPTS = (3, 30, 61, 150)  # lengths: within a block of KV memory, and several of them
_ANSWER = 24  # tokens
_WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("greedy", {"temperature": 0.0}),
    ("greedy", {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.5}),
    ("sampled", {"temperature": 1.0}),
    ("sampled", {"temperature": 0.8, "top_p": 0.9, "top_k": 50}),
)


class Engine(Protocol):
    """The part of vLLM's AsyncLLM that the check needs."""

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str
    ) -> AsyncGenerator[Any, None]:  # of RequestOutput
        """Yield the outputs of a request."""
        ...


async def find_difference(
    engine: Engine,
    parameters: Callable[[SequenceSpec[str]], Any],
    *,
    vocabulary: int,
    context_length: int,
) -> str:
    """Return which of the model's answers differed from the same answer alone, in words; empty if none did.

    parameters       translates a sequence's parameters into vLLM's, with exact draws
    vocabulary       number of the model's logits

    Takes as long as an answer of some 400 tokens.
    """
    specs = [spec for spec in _specs(vocabulary) if len(spec.ids) + _ANSWER <= context_length]
    numbers = count()

    async def answer(spec: SequenceSpec[str]) -> Ids:
        # With a salt of its own, nothing of the prompt is cached.
        number = f"check-{next(numbers)}"
        prompt = {"type": "token", "prompt_token_ids": list(spec.ids), "cache_salt": number}
        ids: Ids = []
        async for output in engine.generate(prompt, parameters(spec), number):
            ids += output.outputs[0].token_ids
        return ids

    alone = [await answer(spec) for spec in specs]
    together = await asyncio.gather(*map(answer, specs))
    if found := _first_difference(specs, alone, together):
        return f"a {found} answer in a batch of {len(specs)}"
    for kept in (1, _ANSWER // 2):
        rest = await asyncio.gather(
            *(answer(_resumed(spec, ids[:kept])) for spec, ids in zip(specs, alone, strict=True))
        )
        if found := _first_difference(specs, [ids[kept:] for ids in alone], rest):
            return f"a {found} answer resumed after {kept} tokens"
    return ""


def _specs(vocabulary: int) -> list[SequenceSpec[str]]:
    # Any ids will do: what the model makes of them is as sensitive to rounding as a real text, or more.
    dice = random.Random(1)
    return [
        SequenceSpec(
            way,
            [dice.randrange(vocabulary) for _ in range(length)],
            length,
            SamplingParams(seed=length, max_tokens=_ANSWER, ignore_eos=True, **params),
        )
        for length in _PROMPTS
        for way, params in _WAYS
    ]


def _resumed(spec: SequenceSpec[str], answer: Ids) -> SequenceSpec[str]:
    return SequenceSpec(spec.key, [*spec.ids, *answer], spec.prompt, spec.params)


def _first_difference(
    specs: Sequence[SequenceSpec[str]], expected: Sequence[Ids], found: Sequence[Ids]
) -> str:
    differing = (spec.key for spec, one, other in zip(specs, expected, found, strict=True) if one != other)
    return next(differing, "")
