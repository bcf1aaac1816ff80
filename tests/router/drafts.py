"""Prompts, a fake batcher that drafts answers, and settings under which the router checks them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, Answer, eventually
from tests.router.fake_batchers import FakeBatcher

PRICES = {"prices": "small=1/2,large=10/20"}
CASCADE = {"cascade": True, "thresholds": "0.9", **PRICES}
GOOD = "The capital of France is Paris."
BAD = "I'm sorry, but I cannot help with that."
QUESTION = "What is the capital of France?"
SUM = "What is 17 + 25?"
EASY = "Hello!"
HARD = "Prove step by step that every natural number has one prime factorisation, and explain why."
SAMPLED = {**CASCADE, "cascade_sample_seconds": PATIENCE / 3}


@dataclass
class TextBatcher(FakeBatcher):
    """Answers every request with `text`, one word per token.

    sample      its answer to requests for a sample: empty never ends, an error is raised
    logprob     of each token; None: it reports none
    fails_after, fails_with   the number of words after which it fails, and the error
    waits       it sends no text before it has received this many requests
    cancelled   number of answers that were cancelled
    """

    text: str = GOOD
    logprob: float | None = -0.01
    length: bool = False
    cancelled: int = 0
    fails_after: int | None = None
    fails_with: errors.HeadraceError | None = None
    sample: str | errors.HeadraceError | None = None
    cached: int = 0
    waits: int = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        if self.refuses:
            await self._fail(self.refuses, context)
        text = self.text
        sample = self.sample if request.request_id.endswith("-sample") else None
        ended = False
        try:
            yield pb.GenerateResponse(
                accepted=pb.Accepted(
                    request_id=request.request_id,
                    model=self.model,
                    prompt_tokens=0 if self.text_only else 10,
                    seed=1,
                    text_only=self.text_only,
                )
            )
            if isinstance(sample, errors.HeadraceError):
                ended = True
                raise sample
            if sample is not None:
                text = sample
            if not text:
                await asyncio.Event().wait()
            await eventually(lambda: len(self.requests) >= self.waits)
            words = text.split(" ")
            for place, word in enumerate(words):
                if place == self.fails_after:
                    ended = True
                    raise self.fails_with or errors.SequenceFault("the engine failed on this request")
                delta = pb.Delta(offset=place, token_count=1, text=word if place == 0 else f" {word}")
                if not self.text_only:
                    delta.token_ids.append(place)
                if request.sampling.logprobs and self.logprob is not None:
                    delta.logprobs.append(self.logprob)
                yield pb.GenerateResponse(delta=delta)
            ended = True
        finally:
            self.cancelled += not ended
        reason = pb.FINISH_REASON_LENGTH if self.length else pb.FINISH_REASON_STOP
        usage = pb.Usage(prompt_tokens=10, cached_tokens=self.cached, completion_tokens=len(words))
        if self.text_only:
            usage = self.usage or pb.Usage()
        yield pb.GenerateResponse(finish=pb.Finish(reason=reason, usage=usage))


def charges(answer: Answer) -> dict[str, tuple[int, int, int, int]]:
    return {
        charge.tier: (charge.attempts, charge.prompt_tokens, charge.completion_tokens, charge.wasted_tokens)
        for charge in answer.finish.bill.charges
    }


def words_of(text: str) -> int:
    return len(text.split(" "))
