"""Who reads slowly gets the whole answer slowly, who does not read is let go; nobody else waits for them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace

from headrace import errors, statuses
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.inbox import Flush, Inbox, Move
from headrace.batcher.job import Job
from headrace.client import Client
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import generation_pb2 as pb
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, collect, eventually, prompt
from tests.tier import OracleEngine, Tier, running_tier

TOKENS = 40
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"seed": 3, "presence_penalty": 1.0, "repetition_penalty": 1.3, "logprobs": True},
]


@given(
    limit=st.integers(1, 9), acts=st.lists(st.one_of(st.integers(1, 12), st.sampled_from(["take", "move"])))
)
def test_an_inbox_keeps_what_it_took_in_order_and_never_more_than_its_limit(
    limit: int, acts: list[int | str]
) -> None:
    async def play() -> None:
        inbox = Inbox(Flush(), limit=limit)
        said, kept, read = 0, list[int](), list[int]()
        for act in acts:
            if isinstance(act, int):
                ids = list(range(said, said + act))
                taken = inbox.put(ids, [float(id) for id in ids])
                assert taken == act or inbox.full
                kept += ids[:taken]
                said += act
            elif act == "move":
                inbox.move(Move("a", "b", "WORKER_LOST", 1))
            elif inbox._ready.is_set():
                arrival = await inbox.take()
                assert arrival.logprobs == arrival.ids
                read += arrival.ids
            assert inbox.unread == len(kept) - len(read) <= limit
        while inbox.unread:
            read += (await inbox.take()).ids
        assert read == kept

    asyncio.run(play())


def job_of(coalescer: Coalescer, text: str, limit: int, sampling: dict[str, Any]) -> Job:
    """What the service makes of a prompt, with an inbox of *limit* tokens."""
    return Job(
        request_id=text,
        prompt_ids=list(text.encode()),
        resume_ids=[],
        sampling=pb.Sampling(max_tokens=TOKENS, ignore_eos=True, **{"seed": 0, **sampling}),
        arrived=time.monotonic(),
        expires=None,
        priority=5,
        attempt=0,
        inbox=Inbox(Flush(), limit=limit),
        span=trace.INVALID_SPAN,
    )


@pytest.fixture(scope="module")
async def tier() -> AsyncGenerator[Tier, None]:
    async with running_tier([OracleEngine(), OracleEngine()]) as running:
        yield running


@pytest.mark.parametrize("limit", [1, 2, 7])
async def test_answers_that_are_paused_again_and_again_lose_nothing_and_say_nothing_twice(
    tier: Tier, limit: int
) -> None:
    """Each reader takes what there is only when its answer has been paused, or by the throw of a die."""
    coalescer = tier.batcher.coalescer
    dice = random.Random(limit)
    pauses = 0

    async def read(job: Job) -> tuple[list[int], list[float]]:
        nonlocal pauses
        ids: list[int] = []
        logprobs: list[float] = []
        async with aclosing(coalescer.arrivals(job)) as arrivals:
            await anext(arrivals)
            while True:
                if dice.random() < 0.8:
                    await eventually(lambda: job in coalescer.paused or job.inbox.closed)
                    pauses += job in coalescer.paused
                assert job.inbox.unread <= limit
                arrival = await anext(arrivals)
                ids += arrival.ids
                logprobs += arrival.logprobs
                if arrival.end is not None:
                    return ids, logprobs

    expected = [await collect(tier.client, asked(kind)) for kind in KINDS]
    jobs = [job_of(coalescer, "slow", limit, kind) for kind in KINDS]
    neighbours = [asyncio.create_task(collect(tier.client, asked(KINDS[1]))) for _ in range(6)]
    for job, whole, (ids, logprobs) in zip(
        jobs, expected, await asyncio.gather(*(read(job) for job in jobs)), strict=True
    ):
        assert ids == whole.ids
        assert logprobs == whole.logprobs
        assert job.history.replayed > 0
    for neighbour in neighbours:
        assert (await neighbour).ids == expected[1].ids
    assert pauses > TOKENS / limit
    await eventually(lambda: not any(link.outstanding for link in coalescer.pool))


def asked(kind: dict[str, Any]) -> pb.GenerateRequest:
    return prompt("slow", max_tokens=TOKENS, ignore_eos=True, **{"seed": 0, **kind})


@asynccontextmanager
async def narrow(port: int) -> AsyncGenerator[grpc.aio.Channel, None]:
    """A channel that takes in little beyond what is read from it."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield channel


LONG = 3000


async def paused(tier: Tier) -> admin.BatcherState:
    """Wait until an answer is paused, and nothing more fits on its way; how the batcher looks then."""
    same, last = 0, admin.SequenceState()
    async with (
        asyncio.timeout(PATIENCE),
        grpc.aio.insecure_channel(f"127.0.0.1:{tier.batcher.server.port}") as channel,
    ):
        while True:
            state = (await AdminServiceStub(channel).Inspect(admin.InspectRequest())).batcher
            now = state.sequences[0] if state.sequences else admin.SequenceState()
            now.ClearField("age")
            # A write that can go on does so while the batcher answers us so many times.
            same = same + 1 if now.paused and now == last else 0
            if same == 30:
                return state
            last = now


async def test_a_caller_that_stops_reading_is_waited_for_without_a_worker_and_gets_the_rest() -> None:
    async with running_tier(
        [EchoEngine(max_running=1)], unread_limit=200, unread_seconds=600, max_tokens=LONG
    ) as tier:
        ask = prompt("abcdefg ", max_tokens=LONG, ignore_eos=True)
        async with narrow(tier.batcher.server.port) as channel:
            call = GenerationServiceStub(channel).Generate(ask)
            responses = aiter(call)
            await anext(responses)
            seen = await paused(tier)
            # The worker takes one at a time: it is free for others now.
            assert (await collect(tier.client, prompt("someone else"))).text == "someone else"
            ids: list[int] = []
            async for response in responses:
                assert response.delta.offset == len(ids) or response.HasField("finish")
                ids += response.delta.token_ids
                finish = response.finish

    assert (seen.paused, seen.sequences[0].paused, seen.sequences[0].peer) == (1, True, "")
    assert seen.sequences[0].unread == 200
    assert bytes(ids) == (b"abcdefg " * LONG)[:LONG]
    assert finish.reason == pb.FINISH_REASON_LENGTH
    assert finish.usage.replayed_tokens > 0


async def test_a_caller_that_never_reads_is_let_go_hears_why_and_can_carry_on() -> None:
    async with running_tier([EchoEngine()], unread_limit=200, unread_seconds=0.5, max_tokens=LONG) as tier:
        ask = prompt("abcdefg ", max_tokens=LONG, ignore_eos=True)
        async with narrow(tier.batcher.server.port) as channel:
            call = GenerationServiceStub(channel).Generate(ask)
            responses = aiter(call)
            await anext(responses)
            await eventually(lambda: not tier.batcher.coalescer.live)
            assert not tier.batcher.coalescer.paused
            ids: list[int] = []
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                async for response in responses:
                    assert response.delta.offset == len(ids)
                    ids += response.delta.token_ids
            assert isinstance(statuses.from_rpc_error(ended.value), errors.SlowReader)
            ask.resume.token_ids.extend(ids)
            rest = await collect(tier.client, ask)

    assert 0 < len(ids) < LONG
    assert bytes(ids + rest.ids) == (b"abcdefg " * LONG)[:LONG]


async def test_our_client_carries_a_slow_readers_answer_on_after_the_server_ended_it() -> None:
    async with running_tier([EchoEngine()], unread_limit=200, unread_seconds=0.5, max_tokens=LONG) as tier:
        ask = prompt("abcdefg ", max_tokens=LONG, ignore_eos=True)
        coalescer = tier.batcher.coalescer
        async with narrow(tier.batcher.server.port) as channel:
            stream = Client(channel).generate(ask, timeout=PATIENCE)
            async with aclosing(stream) as responses:
                await anext(responses)
                await eventually(lambda: not coalescer.live)
                text = "".join([response.delta.text async for response in responses])

    assert text == ("abcdefg " * LONG)[:LONG]


async def test_a_deadline_ends_a_paused_answer_before_its_patience_does() -> None:
    async with (
        running_tier([EchoEngine()], unread_limit=200, unread_seconds=600, max_tokens=LONG) as tier,
        narrow(tier.batcher.server.port) as channel,
    ):
        ask = prompt("abcdefg ", max_tokens=LONG, ignore_eos=True)
        coalescer = tier.batcher.coalescer
        # On a machine that is busy enough the deadline may pass before the first pause, or even before the
        # first word: that ends as well.
        call = GenerationServiceStub(channel).Generate(ask, timeout=5.0)
        with suppress(grpc.aio.AioRpcError):
            await anext(aiter(call))
            await eventually(lambda: coalescer.paused or not coalescer.live)
        await eventually(lambda: not coalescer.live)
        assert not coalescer.paused
        await eventually(lambda: not tier.batcher.server.requests.in_flight)
        await eventually(lambda: not any(link.outstanding for link in coalescer.pool))
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_batcher_that_stops_lets_go_of_paused_answers() -> None:
    async with (
        running_tier([EchoEngine()], unread_limit=200, unread_seconds=600, max_tokens=LONG) as tier,
        narrow(tier.batcher.server.port) as channel,
    ):
        ask = prompt("abcdefg ", max_tokens=LONG, ignore_eos=True)
        responses = aiter(GenerationServiceStub(channel).Generate(ask))
        await anext(responses)
        await paused(tier)
        tier.batcher.coalescer.hand_back()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in responses:
                pass

    assert isinstance(statuses.from_rpc_error(ended.value), errors.Draining)
