"""Details of tokens pass a router complete and once, whatever happens to batchers and routers."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.client import chat, connect
from headrace.progress import Answer as Progress
from headrace.router.answering.cascade import sample_request
from headrace.router.shadow.own_requests import shadow_request
from headrace.v1 import generation_pb2 as pb
from tests.harness import Answer, collect, prompt
from tests.router.drafts import BAD, CASCADE, GOOD, QUESTION, TextBatcher
from tests.router.fake_batchers import FakeBatcher, routed, serving_fake
from tests.router.rogue import ACCEPTED, FINISH, InvalidBatcher, delta, event

TEXT = "details"
IDS = list(TEXT.encode())
PARTS = (1, 3, 3)  # tokens of each part of the prompt


def described(id: int, logprob: float | None, top: int) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token=pb.TokenLogprob(id=id, logprob=logprob, text=bytes([id])),
        top=[pb.TokenLogprob(id=n, logprob=-n / 2, text=b"t") for n in range(top)],
    )


def prompt_details(top: int) -> list[pb.TokenLogprobs]:
    return [described(id, -at / 4 if at else None, top if at else 0) for at, id in enumerate(IDS)]


def answer_details(top: int) -> list[pb.TokenLogprobs]:
    return [described(id, -at / 8, top) for at, id in enumerate(IDS)]


@dataclass
class DetailedBatcher(FakeBatcher):
    """Echoes the prompt with details of all tokens.

    dies    for each request in turn: after how many of its events, `accepted` included, the stream breaks;
            servers may share the list
    """

    dies: list[int] = field(default_factory=list)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        if self.refuses:
            await self._fail(self.refuses, context)
        dies = self.dies.pop(0) if self.dies else None
        for count, made in enumerate(self._events(request)):
            if count == dies:
                await self._fail("broken", context)
            yield made

    def _events(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        sampling, had = request.sampling, len(request.resume.token_ids)
        events = [event(accepted=pb.Accepted(model="echo", tier="only", prompt_tokens=len(IDS), seed=1))]
        if sampling.HasField("prompt_logprobs"):
            assert not had
            at = 0
            for size in PARTS:
                tokens = prompt_details(sampling.prompt_logprobs)[at : at + size]
                events.append(event(prompt_tokens=pb.PromptTokens(offset=at, tokens=tokens)))
                at += size
        for at in range(had, len(IDS)):
            made = delta(at, chr(IDS[at]), token_ids=[IDS[at]])
            if sampling.HasField("top_logprobs"):
                made.delta.tokens.append(answer_details(sampling.top_logprobs)[at])
            if sampling.logprobs:
                made.delta.logprobs.append(-at / 8)
            events.append(made)
        return [*events, FINISH]


def asked(**more: Any) -> pb.GenerateRequest:
    return prompt(TEXT, top_logprobs=2, prompt_logprobs=3, **more)


def check(answer: Answer) -> None:
    assert answer.text == TEXT
    assert answer.prompt == prompt_details(3)
    assert answer.details == answer_details(2)
    assert answer.logprobs == []


EVENTS = 1 + len(PARTS) + len(IDS)


async def test_a_batcher_lost_at_any_event_changes_nothing() -> None:
    for at in range(1, EVENTS + 1):
        dies = [at]
        first, second = DetailedBatcher(dies=dies), DetailedBatcher(dies=dies, running=9)
        async with routed(only=[first, second]) as client:
            check(await collect(client, asked()))
        (resumed,) = second.requests
        assert resumed.sampling.HasField("prompt_logprobs") == (at <= 1 + len(PARTS))
        assert resumed.sampling.top_logprobs == 2


async def test_a_router_lost_at_any_event_changes_nothing() -> None:
    """The client resumes the answer, as the router does for a batcher."""
    for at in range(1, EVENTS + 1):
        server = DetailedBatcher(dies=[at, at + 2] if at < EVENTS else [at])
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(serving_fake(server))
            client = await stack.enter_async_context(connect(address))
            check(await collect(client, asked()))
        assert len(server.requests) > 1


@given(
    tokens=st.integers(1, 40),
    streams=st.lists(st.lists(st.integers(1, 12), max_size=8), min_size=1, max_size=5),
)
def test_parts_of_any_streams_join_to_one_prompt(tokens: int, streams: list[list[int]]) -> None:
    progress = Progress(prompt("x", prompt_logprobs=0))
    seen: list[int] = []
    for sizes in streams:
        at = 0
        for size in sizes:
            ids = range(at, min(at + size, tokens))
            part = pb.PromptTokens(
                offset=at, tokens=[pb.TokenLogprobs(token=pb.TokenLogprob(id=id)) for id in ids]
            )
            for response in progress.take(event(prompt_tokens=part)):
                assert response.prompt_tokens.offset == len(seen)
                seen += [one.token.id for one in response.prompt_tokens.tokens]
            at = ids.stop
        progress.lose(errors.Unavailable("lost"))

    assert seen == list(range(max(min(sum(sizes), tokens) for sizes in streams)))


def _prompt(offset: int, *tokens: pb.TokenLogprobs) -> pb.GenerateResponse:
    return event(prompt_tokens=pb.PromptTokens(offset=offset, tokens=tokens or [pb.TokenLogprobs()]))


NAN = pb.TokenLogprobs(token=pb.TokenLogprob(id=1, logprob=math.nan))
SURE = pb.TokenLogprobs(token=pb.TokenLogprob(id=1, logprob=0.0), top=[pb.TokenLogprob(logprob=1.0)])
IMPOSSIBLE = pb.TokenLogprobs(token=pb.TokenLogprob(id=1, logprob=-math.inf))
WIDE = described(1, -1.0, 4)
WHOLE = [_prompt(0), _prompt(1), _prompt(2)]


@pytest.mark.parametrize(
    "script",
    [
        [ACCEPTED, _prompt(1)],
        [ACCEPTED, *WHOLE, _prompt(3)],
        [ACCEPTED, _prompt(0), _prompt(2)],
        [ACCEPTED, _prompt(0, NAN)],
        [ACCEPTED, _prompt(0, SURE)],
        [ACCEPTED, _prompt(0, WIDE)],
        [ACCEPTED, _prompt(0), delta(0, tokens=[described(97, -1.0, 2)])],
        [ACCEPTED, _prompt(0), FINISH],
        [ACCEPTED, *WHOLE, delta(0, tokens=[described(97, -1.0, 3)])],
        [ACCEPTED, *WHOLE, delta(0, tokens=[NAN])],
        [ACCEPTED, *WHOLE, delta(0, tokens=[IMPOSSIBLE])],
        [ACCEPTED, *WHOLE, delta(0, tokens=[described(97, -1.0, 2)], logprobs=[math.nan])],
        [ACCEPTED, *WHOLE, delta(0, tokens=[SURE])],
        [ACCEPTED, *WHOLE, delta(0, tokens=[described(97, -1.0, 2)] * 2)],
        [ACCEPTED, *WHOLE, delta(0, tokens=[described(97, -1.0, 2)]), _prompt(3)],
    ],
)
async def test_invalid_details_lose_the_batcher(script: list[pb.GenerateResponse]) -> None:
    invalid = [InvalidBatcher(script=[*script, FINISH]) for _ in range(3)]
    async with routed(only=invalid) as client:
        with pytest.raises(errors.BatcherLost):
            await collect(client, prompt("abc", top_logprobs=2, prompt_logprobs=3))


async def test_no_token_is_delivered_before_the_details_of_the_whole_prompt() -> None:
    early = delta(0, tokens=[described(97, -1.0, 2)])
    async with routed(
        only=[InvalidBatcher(script=[ACCEPTED, _prompt(0), early]) for _ in range(3)]
    ) as client:
        seen = pb.GenerateResponse()
        with pytest.raises(errors.BatcherLost):
            async for response in client.generate(
                prompt("abc", top_logprobs=2, prompt_logprobs=3), timeout=9
            ):
                seen = response
    assert seen.WhichOneof("event") == "prompt_tokens"


async def test_tokens_of_a_prompt_that_were_not_requested_lose_the_batcher() -> None:
    async with routed(only=[InvalidBatcher(script=[ACCEPTED, _prompt(0)]) for _ in range(3)]) as client:
        with pytest.raises(errors.BatcherLost):
            await collect(client, prompt("abc"))


@pytest.mark.parametrize("name", ["top_logprobs", "prompt_logprobs"])
async def test_a_batcher_that_ignores_the_request_for_details_is_of_an_older_version(name: str) -> None:
    async with routed({"poll_seconds": 60}, only=FakeBatcher()) as client:
        with pytest.raises(errors.InvalidSampling, match=f"does not support sampling.{name}"):
            await collect(client, prompt("abc", **{name: 1}))
        assert (await collect(client, prompt("abc"))).text == "abc", "it serves other requests"


LACKS = errors.InvalidSampling("not supported", field="sampling.prompt_logprobs", feature="prompt_logprobs")


async def test_a_tier_without_the_feature_is_replaced_by_another() -> None:
    small, large = DetailedBatcher(refuses=LACKS), DetailedBatcher()
    async with routed(small=small, large=large) as client:
        answer = await collect(client, asked())
        check(answer)
        assert answer.accepted.tier == "large"
        pinned = asked()
        pinned.routing.tier = "small"
        with pytest.raises(errors.InvalidSampling, match="not supported"):
            await collect(client, pinned)
    async with routed(only=DetailedBatcher(refuses=LACKS)) as client:
        with pytest.raises(errors.InvalidSampling, match="not supported"):
            await collect(client, asked())


async def test_a_batcher_without_the_feature_is_replaced_by_another_of_its_tier() -> None:
    lacking, able = DetailedBatcher(refuses=LACKS), DetailedBatcher()
    async with routed(only=[lacking, able]) as client:
        while not (lacking.requests and able.requests):
            check(await collect(client, asked()))
        able.dies.append(5)
        check(await collect(client, asked()))  # it resumes, although the other batcher is asked first


async def test_a_feature_that_a_busy_batcher_may_have_is_not_reported_as_missing() -> None:
    busy = DetailedBatcher(refuses=errors.NoWorkers("not ready yet", retry_after=1.0))
    async with routed(only=[DetailedBatcher(refuses=LACKS), busy]) as client:
        for _ in range(4):
            with pytest.raises(errors.NoWorkers, match="not ready yet"):
                await collect(client, asked(), timeout=1)


async def test_other_invalid_requests_are_not_offered_to_another_tier() -> None:
    refuses = errors.InvalidSampling("a bad field", field="sampling.top_p")
    large = DetailedBatcher()
    async with routed(small=DetailedBatcher(refuses=refuses), large=large) as client:
        with pytest.raises(errors.InvalidSampling, match="bad field"):
            await collect(client, asked())
    assert not large.requests


# Drafts.


async def test_a_request_for_details_of_its_prompt_is_not_drafted() -> None:
    small, large = DetailedBatcher(), DetailedBatcher()
    async with routed(CASCADE, small=small, large=large) as client:
        check(await collect(client, asked()))
    (request,) = small.requests + large.requests
    assert not request.sampling.logprobs, "no draft is checked"


@dataclass
class DetailedDrafts(TextBatcher):
    """A TextBatcher that describes its tokens."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for response in super().Generate(request, context):
            if response.delta.token_count and request.sampling.HasField("top_logprobs"):
                response.delta.tokens.append(described(120, -0.5, request.sampling.top_logprobs))
            yield response


@pytest.mark.parametrize(("draft", "tier"), [(GOOD, "small"), (BAD, "large")])
@pytest.mark.parametrize("wanted", [True, False])
async def test_only_callers_that_request_details_of_a_drafted_answer_receive_them(
    draft: str, tier: str, wanted: bool
) -> None:
    small, large = DetailedDrafts(text=draft), DetailedDrafts()
    request = chat(QUESTION)
    if wanted:
        request.sampling.top_logprobs = 2
    async with routed(CASCADE, small=small, large=large) as client:
        answer = await collect(client, request)

    assert answer.accepted.tier == tier
    assert answer.logprobs == [], "which the check reads"
    assert answer.details == ([described(120, -0.5, 2)] * answer.tokens if wanted else [])
    assert small.requests[0].sampling.logprobs


def test_requests_of_the_routers_own_ask_for_no_details() -> None:
    request = asked(logprobs=True)
    for own in (sample_request(request, 10), shadow_request(request)):
        assert not own.sampling.logprobs
        assert not own.sampling.HasField("top_logprobs")
        assert not own.sampling.HasField("prompt_logprobs")
