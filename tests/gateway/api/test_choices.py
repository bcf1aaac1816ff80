"""Several choices of one request: one is routed, and the others follow it."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from headrace import errors
from headrace.gateway.api import choices
from tests.gateway.fake_router import TEXT, Edge
from tests.harness import eventually


async def test_the_first_choice_is_routed_and_the_others_are_pinned_to_its_tier(plain: Edge) -> None:
    hints = {"x-headrace-min-tier": "small", "x-headrace-max-tier": "large", "x-headrace-session": "s"}
    response = await plain.chat(n=3, seed=2**64 - 1, headers=hints)

    first, *others = plain.router.requests
    assert (first.routing.tier, first.routing.model) == ("", "")
    assert (first.routing.min_tier, first.routing.max_tier) == ("small", "large")
    assert [(other.routing.tier, other.routing.model) for other in others] == [("small", "tiny")] * 2
    assert not any(other.routing.min_tier or other.routing.max_tier for other in others)
    assert all(other.routing.session_id == "s" and not other.routing.cascade for other in others)
    assert [asked.sampling.seed for asked in plain.router.requests] == [2**64 - 1, 0, 1]
    assert [asked.request_id.removeprefix(first.request_id) for asked in others] == ["-1", "-2"]
    answers = response.json()["choices"]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert {answer["message"]["content"] for answer in answers} == {TEXT}


async def test_without_a_seed_the_choices_have_consecutive_random_ones(plain: Edge) -> None:
    await plain.chat(n=3)
    await plain.chat(n=3)

    seeds = [asked.sampling.seed for asked in plain.router.requests]
    assert [(seed - seeds[0]) % 2**64 for seed in seeds[:3]] == [0, 1, 2]
    assert seeds[0] != seeds[3]


async def test_the_prompt_counts_once_and_answers_and_costs_add_up(plain: Edge) -> None:
    response = await plain.chat(n=3)

    answer = response.json()
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 15,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert answer["headrace"]["cost"] == 1.5
    assert response.headers["x-headrace-cost"] == "1.5"
    assert answer["headrace"]["answer_id"] == "answer-0"
    assert sorted(answer["headrace"]["answer_ids"]) == ["answer-0", "answer-1", "answer-2"]


async def test_the_others_start_when_the_prompt_is_computed(plain: Edge) -> None:
    """They find it in the prefix cache then; before, each of them would compute it."""
    plain.router.held_back = asyncio.Event()
    asking = asyncio.create_task(plain.chat(n=2))
    await eventually(lambda: plain.router.active == 1)
    plain.router.held_back.set()
    await asking

    assert plain.router.started_after == [0, 1], "the second request came after the first one's first token"


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]


async def test_a_stream_interleaves_its_choices(plain: Edge) -> None:
    gate = plain.router.gate = asyncio.Event()
    asking = asyncio.create_task(plain.chat(n=3, stream=True, stream_options={"include_usage": True}))
    await eventually(lambda: plain.router.active == 3)  # all at the same time
    gate.set()

    chunks = events_of((await asking).text)
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [TEXT] * 3
    assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in chunks[:-1]) == 3
    assert sum(chunk["choices"][0]["delta"].get("role") == "assistant" for chunk in chunks[:-1]) == 3
    assert chunks[-1]["usage"]["total_tokens"] == 22
    assert [chunk["choices"] for chunk in chunks if "headrace" in chunk] == [[]]


async def test_only_the_last_chunk_of_a_stream_without_usage_has_the_bill(plain: Edge) -> None:
    chunks = events_of((await plain.chat(n=3, stream=True)).text)

    assert ["headrace" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["headrace"]["cost"] == 1.5


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_the_failure_of_one_choice_ends_all(plain: Edge, failing: int) -> None:
    plain.router.breaks, plain.router.failing = errors.SequenceFault("the engine failed"), failing

    response = await plain.chat(n=3)

    assert response.status_code == 500
    await eventually(lambda: plain.router.active == 0)


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_the_failure_of_one_streamed_choice_ends_all(plain: Edge, failing: int) -> None:
    plain.router.breaks, plain.router.failing = errors.SequenceFault("the engine failed"), failing

    response = await plain.chat(n=3, stream=True)

    assert response.text.count('"error":') == 1
    assert "[DONE]" not in response.text
    await eventually(lambda: plain.router.active == 0)


async def test_the_failure_of_a_choice_cancels_those_that_run(plain: Edge) -> None:
    plain.router.gate = asyncio.Event()  # never set: nothing ends by itself
    plain.router.refuses, plain.router.failing = errors.Overloaded("queue is full"), 2

    response = await plain.chat(n=3)

    assert response.status_code == 429
    await eventually(lambda: plain.router.active == 0)


async def test_leaving_cancels_all_choices(plain: Edge) -> None:
    plain.router.gate = asyncio.Event()
    asking = asyncio.create_task(plain.chat(n=4))
    await eventually(lambda: plain.router.active == 4)

    asking.cancel()

    await eventually(lambda: plain.router.active == 0)


async def test_the_deadline_is_that_of_all_choices_together(
    plain: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(choices, "time", SimpleNamespace(monotonic=lambda: now[0]))
    plain.router.held_back = asyncio.Event()
    asking = asyncio.create_task(plain.chat(n=2, headers={"x-headrace-deadline": "3000"}))
    await eventually(lambda: plain.router.active == 1)
    now[0] = 1000.0
    plain.router.held_back.set()
    await asking

    # gRPC rounds a deadline up, by a few percent.
    assert [round(left or 0, -3) for left in plain.router.time_left] == [3000, 2000]
