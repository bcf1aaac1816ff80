"""What every service with OpenAI's API must do behind an upstream, whatever its model says."""

from __future__ import annotations

import json
from contextlib import aclosing

import pytest

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect, eventually
from tests.upstream.tier import UpstreamTier, ask

_SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


async def check_service(tier: UpstreamTier, *, min_prompt: int = 1) -> None:
    """Check answers, limits, stop texts, forms, log-probabilities, mistakes and cancellation."""
    client = tier.client
    answer = await collect(client, ask("Say hello.", temperature=0, max_tokens=8))
    usage = answer.finish.usage
    assert answer.accepted.text_only
    assert answer.text
    assert usage.prompt_tokens >= min_prompt
    assert 1 <= usage.completion_tokens <= 8
    assert answer.finish.reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)

    short = await collect(client, ask("Count from one to one hundred, in words.", max_tokens=3))
    assert short.finish.reason == pb.FINISH_REASON_LENGTH
    assert short.finish.usage.completion_tokens == 3

    raw = await collect(client, pb.GenerateRequest(prompt="Once", sampling=pb.Sampling(max_tokens=4)))
    assert raw.finish.usage.completion_tokens <= 4

    detailed = await collect(client, ask("Hello", temperature=0, max_tokens=4, logprobs=True, top_logprobs=2))
    assert detailed.details
    assert all(one.token.logprob <= 0 and len(one.top) == 2 for one in detailed.details)

    form = ask("Name a city.", temperature=0, max_tokens=40, json_schema=json.dumps(_SCHEMA))
    formed = await collect(client, form)
    assert json.loads(formed.text)["city"] in ("Paris", "Rome")

    with pytest.raises(errors.ContextTooLong):
        await collect(client, ask("word " * 20_000, max_tokens=1))

    async with aclosing(client.generate(ask("Tell a long story.", max_tokens=500), timeout=60)) as responses:
        async for response in responses:
            if response.delta.token_count:
                break
    await eventually(lambda: not tier.left_behind)
