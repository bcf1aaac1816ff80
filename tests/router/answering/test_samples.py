"""A sample of the same tier is compared with a draft, and never delays or fails the request for long."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from headrace import errors
from headrace.client import chat
from headrace.routing.drafts.check import Check, DraftChecker, load
from tests.harness import PATIENCE, Answer, collect, eventually
from tests.router.drafts import BAD, CASCADE, GOOD, QUESTION, SAMPLED, SUM, TextBatcher, charges, words_of
from tests.router.fake_batchers import routed


@pytest.mark.parametrize(("length", "draft_tokens"), [(False, 12), (True, 500)])
async def test_a_draft_that_is_checked_before_its_end_is_compared_with_its_sample(
    length: bool, draft_tokens: int
) -> None:
    """Whether its length is limited by the configuration or by the request."""
    compared: list[Sequence[str]] = []
    text = "There are 42 of them. That is all. " + "Nothing more is said here. " * 20
    sample = "There are 41. That is so, and it goes on"
    small = TextBatcher(text=text.strip(), sample=sample, length=length)
    settings = {**SAMPLED, "cascade_draft_tokens": draft_tokens}
    with pytest.MonkeyPatch.context() as patched:
        check = DraftChecker.check

        def seen(self: DraftChecker, *texts: str, **evidence: Any) -> Check:
            compared.append(evidence["samples"])
            return check(self, *texts, **evidence)

        patched.setattr(DraftChecker, "check", seen)
        async with routed(settings, small=small, large=TextBatcher()) as client:
            answer = await collect(client, chat("How many are there?"))

    assert len(small.requests) == 2
    assert compared[0] == (sample,)
    assert answer.finish.usage.wasted_tokens >= words_of(sample)


async def released_with(small: TextBatcher, settings: dict[str, Any]) -> Answer:
    """Return the answer to a sum with the small tier's draft checked under *settings*."""
    async with routed(settings, small=small, large=TextBatcher(text="By the large tier: 42")) as client:
        return await collect(client, chat(SUM, temperature=0, max_tokens=40))


async def test_a_sample_that_agrees_releases_a_draft_that_a_different_one_rejects() -> None:
    """The minimum quality is between the two verdicts, so that only the sample decides."""
    checker = load()
    logprobs = [-0.01] * 4
    agrees = checker.check(SUM, "The sum is 42.", logprobs=logprobs, samples=["It is 42."]).good
    differs = checker.check(SUM, "The sum is 42.", logprobs=logprobs, samples=["It is 41."]).good
    settings = {**SAMPLED, "cascade_min_quality": (agrees + differs) / 2}

    same = await released_with(TextBatcher(text="The sum is 42.", sample="It is 42."), settings)
    other = await released_with(TextBatcher(text="The sum is 42.", sample="It is 41."), settings)

    assert (same.accepted.tier, other.accepted.tier) == ("small", "large")


async def test_a_sample_has_another_seed_a_temperature_and_few_tokens() -> None:
    small = TextBatcher(sample="Paris")
    request = chat(QUESTION, temperature=0, max_tokens=500, seed=7, logprobs=True)
    request.stream.include_token_ids = True
    async with routed({**SAMPLED, "cascade_draft_tokens": 32}, small=small, large=TextBatcher()) as client:
        answer = await collect(client, request)

    drafted, sampled = sorted(small.requests, key=lambda asked: asked.request_id.endswith("-sample"))
    assert answer.text == GOOD
    assert drafted.sampling.temperature == 0
    assert drafted.sampling.max_tokens == 500
    assert sampled.request_id == f"{drafted.request_id}-sample"
    assert sampled.sampling.temperature == pytest.approx(0.7)
    assert sampled.sampling.max_tokens == 32
    assert sampled.sampling.seed != drafted.sampling.seed == 7
    assert sampled.chat == drafted.chat
    assert not sampled.sampling.logprobs


async def test_a_sample_is_billed_as_waste_whether_the_draft_is_released_or_not() -> None:
    sample = "It is Paris"
    settings = {**SAMPLED, "cascade_min_quality": 0}
    async with routed(settings, small=TextBatcher(sample=sample), large=TextBatcher()) as client:
        released = await collect(client, chat(QUESTION))
    async with routed(SAMPLED, small=TextBatcher(text=BAD, sample=sample), large=TextBatcher()) as client:
        escalated = await collect(client, chat(QUESTION))

    assert charges(released) == {"small": (2, 20, 6, 3)}
    assert released.finish.usage.wasted_tokens == 3
    assert charges(escalated) == {"small": (2, 20, 0, words_of(BAD) + 3), "large": (1, 10, 6, 0)}
    assert escalated.finish.usage.wasted_tokens == words_of(BAD) + 3


@pytest.mark.parametrize("sample", [errors.Overloaded("full", retry_after=1.0), errors.SequenceFault("oh")])
async def test_a_draft_whose_sample_fails_is_checked_without_it(sample: errors.HeadraceError) -> None:
    async with routed(SAMPLED, small=TextBatcher(sample=sample), large=TextBatcher()) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.text == GOOD
    assert answer.accepted.tier == "small"
    assert answer.finish.usage.wasted_tokens == 0


async def test_a_late_sample_is_cancelled_after_the_configured_time() -> None:
    small = TextBatcher(sample="", waits=2)
    async with routed(
        {**CASCADE, "cascade_sample_seconds": 0.05}, small=small, large=TextBatcher()
    ) as client:
        answer = await collect(client, chat(QUESTION))
        await eventually(lambda: small.cancelled == 1)

    assert answer.text == GOOD
    assert answer.accepted.tier == "small"


async def test_draft_and_sample_are_cancelled_if_the_caller_leaves() -> None:
    small = TextBatcher(text="", sample="")
    async with routed(SAMPLED, small=small, large=TextBatcher()) as client:
        small.text = ""
        stream = client.generate(chat(QUESTION), timeout=PATIENCE)
        waiting = asyncio.ensure_future(anext(stream))
        await eventually(lambda: len(small.requests) == 2)
        waiting.cancel()
        await asyncio.wait([waiting])
        await stream.aclose()
        await eventually(lambda: small.cancelled == 2)
        async with asyncio.timeout(10):
            while not (await client.list_tiers()).bill.charges[0].prompt_tokens:
                await asyncio.sleep(0.01)  # the draft's prompt is billed


async def test_no_sample_is_drawn_without_a_check_without_time_or_with_a_queue() -> None:
    unjudged = chat(QUESTION)
    unjudged.routing.cascade = False
    small = TextBatcher(sample=GOOD)
    async with routed({**SAMPLED, "cascade_sample_seconds": 30}, small=small, large=TextBatcher()) as client:
        await collect(client, unjudged)
        await collect(client, chat(QUESTION), timeout=20)
    busy = TextBatcher(sample=GOOD, queued=3)
    async with routed(SAMPLED, small=busy, large=TextBatcher()) as client:
        await collect(client, chat(QUESTION))

    assert len(small.requests) == 2
    assert len(busy.requests) == 1
