"""A mesh whose larger tier is a service outside of it: a fake one, or the gateway of another mesh."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from headrace import errors
from headrace.client import Client, chat, tool
from headrace.gateway.__main__ import gateway
from headrace.gateway.settings import Settings as GatewaySettings
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenizer_service_pb2 as tokens_pb
from tests.harness import PATIENCE, collect, prompt, running_mesh
from tests.router.drafts import BAD, GOOD, QUESTION, TextBatcher, charges, words_of
from tests.router.fake_batchers import routed
from tests.upstream.fake import DONE, MODEL, Fake, delta, event, fake_upstream, finish, refuses, says, usage
from tests.upstream.tier import running_upstream

SETTINGS = {"cascade": True, "thresholds": "0.9", "prices": "small=1/2,large=10/20/5"}
ANSWER = says(*(delta(f"{word} ") for word in GOOD.split()), finish(), usage(30, 12), DONE)


@asynccontextmanager
async def across(small: TextBatcher, *fakes: Fake | str, **options: Any) -> AsyncGenerator[Client, None]:
    """Run a router with a small tier of this mesh, and a large one outside of it."""
    async with running_upstream(*fakes, **options) as tier:
        address = f"127.0.0.1:{tier.running.server.port}"
        async with routed(SETTINGS, small=small, large=address) as client:
            yield client


@asynccontextmanager
async def other_mesh(**settings: Any) -> AsyncGenerator[str, None]:
    """Run another mesh with a gateway; yield the base URL of its API."""
    async with (
        running_mesh("only", router_settings=settings) as mesh,
        gateway(GatewaySettings(port=0, router=f"127.0.0.1:{mesh.port}")) as edge,
    ):
        yield f"http://127.0.0.1:{edge.port}/v1"


async def test_a_bad_draft_is_replaced_by_the_service_outside_and_billed_by_its_usage() -> None:
    async with fake_upstream() as fake, across(TextBatcher(text=BAD), fake) as client:
        fake.usual = ANSWER
        answer = await collect(client, chat(QUESTION))
        listed = await client.list_tiers()

    assert (answer.text.strip(), answer.accepted.tier, answer.accepted.model) == (GOOD, "large", MODEL)
    assert answer.accepted.text_only
    assert charges(answer) == {"small": (1, 10, 0, words_of(BAD)), "large": (1, 30, 12, 0)}
    cost = (10 * 1 + words_of(BAD) * 2 + 30 * 10 + 12 * 20) / 1e6
    assert answer.finish.bill.cost == pytest.approx(cost)
    assert answer.finish.bill.largest_tier_cost == pytest.approx((30 * 10 + 12 * 20) / 1e6)
    assert listed.bill.cost == pytest.approx(cost)
    (seen,) = fake.seen
    body = json.loads(seen.body)
    assert "logprobs" not in body, "they are wanted of drafts only"


async def test_a_good_draft_asks_nobody_outside() -> None:
    async with fake_upstream() as fake, across(TextBatcher(), fake) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.text, answer.accepted.tier) == (GOOD, "small")
    assert fake.seen == []


async def test_a_draft_is_released_if_the_service_outside_cannot_answer() -> None:
    async with fake_upstream() as fake, across(TextBatcher(text=BAD), fake) as client:
        fake.usual = refuses(503)
        answer = await collect(client, chat(QUESTION))

    assert (answer.text, answer.accepted.tier) == (BAD, "small")


async def test_an_answer_that_breaks_off_outside_ends_with_what_was_delivered() -> None:
    small = TextBatcher(text=BAD)
    text = ""
    async with fake_upstream() as fake, across(small, fake) as client:
        fake.usual = says(delta("The capital "), delta("of "))
        with pytest.raises(errors.UpstreamLost):
            async with aclosing(client.generate(chat(QUESTION), timeout=PATIENCE)) as stream:
                async for response in stream:
                    text += response.delta.text
        bill = (await client.list_tiers()).bill

    assert text == "The capital of "
    assert len(fake.seen) == len(small.requests) == 1
    large = bill.charges[1]
    assert (large.tier, large.completion_tokens) == ("large", 2)
    assert large.prompt_tokens == 16, "an estimate: 30 characters, and a message"


async def test_a_request_that_the_service_outside_cannot_answer_goes_to_a_tier_of_the_mesh() -> None:
    request = chat(QUESTION)
    request.routing.cascade = False
    async with fake_upstream() as fake, across(TextBatcher(), fake) as client:
        pinned = prompt("x")
        pinned.routing.tier = "large"
        pinned.sampling.stop_token_ids.append(5)
        with pytest.raises(errors.InvalidRequest) as rejected:
            await collect(client, pinned)
        request.sampling.stop_token_ids.append(5)
        answer = await collect(client, request)
        by_ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]))
        by_ids.routing.tier = "large"
        with pytest.raises(errors.InvalidRequest):
            await collect(client, by_ids)

    assert "stop_token_ids" in rejected.value.field
    assert answer.accepted.tier == "small"
    assert fake.seen == []


async def test_tools_reasoning_and_hidden_tokens_pass_through() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "clock", "arguments": ""}}
    part = {"index": 0, "function": {"arguments": '{"zone": "UTC"}'}}
    script = says(
        delta(reasoning_content="I need the clock."),
        delta(tool_calls=[call]),
        delta(tool_calls=[part]),
        finish("tool_calls"),
        event({"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 500}}),
        DONE,
    )
    request = chat("What time is it?", tools=[tool("clock", "Returns the time.")])
    request.routing.tier = "large"
    async with fake_upstream() as fake, across(TextBatcher(), fake) as client:
        fake.usual = script
        answer = await collect(client, request)

    assert answer.reasoning == "I need the clock."
    assert [(made.id, made.name, made.arguments) for made in answer.calls] == [
        ("c1", "clock", '{"zone": "UTC"}')
    ]
    assert answer.finish.usage.completion_tokens == 500, "with those of thoughts that nobody sees"
    assert charges(answer)["large"] == (1, 40, 500, 0)


async def test_another_mesh_answers_through_its_gateway() -> None:
    async with other_mesh() as url, across(TextBatcher(text=BAD), url, api="vllm", model="echo") as client:
        answer = await collect(client, chat(QUESTION, temperature=0))
        pinned = prompt("as it is", top_logprobs=2, logprobs=True)
        pinned.routing.tier = "large"
        described = await collect(client, pinned)
        with pytest.raises(errors.Unimplemented, match="has no tokenizer"):
            choice = tokens_pb.TokenizerChoice(tier="large")
            await client.count_tokens(tokens_pb.CountTokensRequest(prompt="x", tokenizer=choice))

    assert (answer.text, answer.accepted.tier) == (QUESTION, "large")
    usage_of = answer.finish.usage
    assert usage_of.completion_tokens == len(QUESTION)
    assert usage_of.prompt_tokens > 0
    assert described.text == "as it is"
    assert b"".join(token.token.text for token in described.details) == b"as it is"
    assert len(described.logprobs) == len(described.details)


async def test_two_meshes_may_draft_for_each_other() -> None:
    """The small tier is outside, and the large one is here."""
    async with fake_upstream() as fake, running_upstream(fake, tier="outside") as tier:
        fake.usual = says(*(delta(f"{word} ") for word in BAD.split()), finish(), usage(30, 12), DONE)
        settings = {**SETTINGS, "cascade_min_quality": 0.3}
        address = f"127.0.0.1:{tier.running.server.port}"
        async with routed(settings, small=address, large=TextBatcher()) as client:
            replaced = await collect(client, chat(QUESTION))
            fake.usual = ANSWER
            released = await collect(client, chat(QUESTION))

    assert (replaced.text, replaced.accepted.tier) == (GOOD, "large")
    assert charges(replaced)["small"][1:] == (30, 0, 12)
    assert (released.text.strip(), released.accepted.tier) == (GOOD, "small")
    assert charges(released)["small"][1:] == (30, 12, 0)
