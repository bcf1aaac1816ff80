"""Drafts and answers of text alone in a cascade: checked by what there is, billed by what was reported."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from headrace import errors
from headrace.client import chat
from headrace.router.answering.prompts import estimated_tokens
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect
from tests.router.answering.test_text_only import USAGE, until_lost
from tests.router.drafts import BAD, CASCADE, GOOD, QUESTION, SAMPLED, TextBatcher, charges, words_of
from tests.router.fake_batchers import routed


async def test_a_text_alone_replaces_a_bad_draft_of_this_mesh() -> None:
    large = TextBatcher(text_only=True, usage=USAGE, logprob=None)
    async with routed(CASCADE, small=TextBatcher(text=BAD), large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.text, answer.accepted.tier, answer.accepted.text_only) == (GOOD, "large", True)
    assert charges(answer) == {"small": (1, 10, 0, words_of(BAD)), "large": (1, 20, 9, 0)}
    assert answer.finish.usage.wasted_tokens == words_of(BAD)


@pytest.mark.parametrize(("logprob", "least"), [(-0.01, 0.4), (None, 0.3)])
async def test_a_good_draft_of_text_alone_is_released(logprob: float | None, least: float) -> None:
    """Without log-probabilities nothing speaks for a draft, so its estimate is below the usual minimum."""
    small, large = TextBatcher(text_only=True, usage=USAGE, logprob=logprob), TextBatcher()
    async with routed({**CASCADE, "cascade_min_quality": least}, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.text, answer.accepted.tier) == (GOOD, "small")
    assert charges(answer) == {"small": (1, 20, 9, 0)}
    assert large.requests == []


async def test_without_log_probabilities_a_sample_may_speak_for_a_draft() -> None:
    small, large = TextBatcher(text_only=True, usage=USAGE, logprob=None), TextBatcher()
    async with routed(SAMPLED, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.text, answer.accepted.tier) == (GOOD, "small")
    assert charges(answer) == {"small": (2, 40, 9, 9)}, "the sample is billed by its usage"


@pytest.mark.parametrize("least", [0.3, 0.4])
async def test_a_bad_draft_of_text_alone_is_replaced_and_billed_by_its_usage(least: float) -> None:
    small = TextBatcher(text=BAD, text_only=True, usage=USAGE, logprob=None)
    async with routed({**CASCADE, "cascade_min_quality": least}, small=small, large=TextBatcher()) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.text, answer.accepted.tier, answer.accepted.text_only) == (GOOD, "large", False)
    assert charges(answer) == {"small": (1, 20, 0, 9), "large": (1, 10, 6, 0)}


async def test_a_draft_that_is_judged_before_its_end_is_billed_by_estimates() -> None:
    words = 2 * words_of(BAD)
    small = TextBatcher(text=f"{BAD} {BAD} {BAD} {BAD}", text_only=True, usage=USAGE, logprob=None)
    settings = {**CASCADE, "cascade_draft_tokens": words}
    async with routed(settings, small=small, large=TextBatcher()) as client:
        answer = await collect(client, chat(QUESTION))

    assert answer.accepted.tier == "large"
    attempts, prompt_tokens, completion, wasted = charges(answer)["small"]
    assert (attempts, completion) == (1, 0)
    assert prompt_tokens == math.ceil(estimated_tokens(chat(QUESTION)))
    assert wasted >= words


async def test_a_draft_that_is_lost_is_replaced_because_the_caller_has_received_nothing() -> None:
    lost = errors.UpstreamLost("the service outside broke off")
    small = TextBatcher(text_only=True, fails_after=3, fails_with=lost)
    async with routed(CASCADE, small=small, large=TextBatcher()) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.text, answer.accepted.tier) == (GOOD, "large")


async def test_an_answer_that_breaks_off_after_a_draft_was_replaced_is_not_replaced_by_it() -> None:
    lost = errors.UpstreamLost("the service outside broke off")
    large = TextBatcher(text_only=True, fails_after=3, fails_with=lost)
    async with routed(CASCADE, small=TextBatcher(text=BAD), large=large) as client:
        text, error = await until_lost(client, chat(QUESTION))
        bill = (await client.list_tiers()).bill

    assert text == "The capital of"
    assert error.reason == "UPSTREAM_LOST"
    assert [(charge.tier, charge.completion_tokens, charge.wasted_tokens) for charge in bill.charges] == [
        ("small", 0, words_of(BAD)),
        ("large", 3, 0),
    ]


async def test_a_draft_in_a_form_needs_no_log_probabilities() -> None:
    request = chat("Where is the Eiffel Tower?", json_object=True)
    small = TextBatcher(text='{"city": "Paris"}', text_only=True, usage=USAGE, logprob=None)
    broken = TextBatcher(text='{"city": Paris', text_only=True, usage=USAGE, logprob=None)
    large = TextBatcher(text='{"city": "Paris, France"}')
    async with routed(CASCADE, small=small, large=TextBatcher()) as client:
        good = await collect(client, request)
    async with routed(CASCADE, small=broken, large=large) as client:
        replaced = await collect(client, request)

    assert (good.text, good.accepted.tier) == (small.text, "small")
    assert (replaced.text, replaced.accepted.tier) == (large.text, "large")


@dataclass
class Plain(TextBatcher):
    """Rejects requests for log-probabilities, as services of some models do."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if request.sampling.logprobs:
            self.requests.append(request)
            raise errors.InvalidSampling("it has none", field="sampling.logprobs", feature="logprobs")
        async for response in super().Generate(request, context):
            yield response


async def test_the_tier_that_replaces_drafts_is_not_asked_for_log_probabilities() -> None:
    small, large = TextBatcher(text=BAD), Plain(text_only=True, usage=USAGE)
    async with routed(CASCADE, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.text, answer.accepted.tier) == (GOOD, "large")
    assert [request.sampling.logprobs for request in (*small.requests, *large.requests)] == [True, False]


async def test_a_tier_that_rejects_log_probabilities_drafts_without_them() -> None:
    small, large = Plain(text_only=True, usage=USAGE), TextBatcher()
    async with routed({**CASCADE, "cascade_min_quality": 0.3}, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION))

    assert (answer.text, answer.accepted.tier) == (GOOD, "small")
    assert [request.sampling.HasField("logprobs") for request in small.requests] == [True, False]
    assert large.requests == []


async def test_log_probabilities_that_the_caller_wants_come_from_a_tier_that_has_them() -> None:
    small, large = Plain(text_only=True, usage=USAGE), TextBatcher()
    async with routed(CASCADE, small=small, large=large) as client:
        answer = await collect(client, chat(QUESTION, logprobs=True))

    assert answer.accepted.tier == "large"
    assert len(answer.logprobs) == words_of(GOOD)
