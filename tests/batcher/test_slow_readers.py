"""A slow reader receives the whole answer, one that never reads is ended; neither delays other callers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace

from headrace import errors, statuses
from headrace.batcher.coalescer import Coalescer
from headrace.batcher.inbox import Inbox, WorkerChange
from headrace.batcher.job import Job
from headrace.client import Client
from headrace.deadline import NEVER
from headrace.flushing import Flusher
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
def test_an_inbox_keeps_accepted_tokens_in_order_and_never_more_than_its_limit(
    limit: int, acts: list[int | str]
) -> None:
    async def play() -> None:
        inbox = Inbox(Flusher(), limit=limit)
        sent, kept, read = 0, list[int](), list[int]()
        for act in acts:
            if isinstance(act, int):
                ids = list(range(sent, sent + act))
                accepted = inbox.put(ids, [float(id) for id in ids])
                assert accepted == act or inbox.full
                kept += ids[:accepted]
                sent += act
            elif act == "move":
                inbox.put_event(WorkerChange("a", "b", "WORKER_LOST", 1))
            elif inbox.ready:
                arrival = await inbox.take()
                assert arrival.scores == arrival.ids
                read += arrival.ids
            assert inbox.unread == len(kept) - len(read) <= limit
        while inbox.unread:
            read += (await inbox.take()).ids
        assert read == kept

    asyncio.run(play())


def job_of(coalescer: Coalescer, text: str, limit: int, sampling: dict[str, Any]) -> Job:
    """Return a job as the intake makes it of a prompt, with an inbox of *limit* tokens."""
    return Job(
        request_id=text,
        prompt_ids=list(text.encode()),
        resume_ids=[],
        sampling=pb.Sampling(max_tokens=TOKENS, ignore_eos=True, **{"seed": 0, **sampling}),
        arrived=time.monotonic(),
        deadline=NEVER,
        priority=5,
        attempt=0,
        inbox=Inbox(Flusher(), limit=limit),
        span=trace.INVALID_SPAN,
    )


@pytest.fixture(scope="module")
async def tier() -> AsyncGenerator[Tier, None]:
    async with running_tier([OracleEngine(), OracleEngine()]) as running:
        yield running


@pytest.mark.parametrize("limit", [1, 2, 7])
async def test_answers_that_are_paused_repeatedly_lose_and_repeat_nothing(tier: Tier, limit: int) -> None:
    """Each reader reads only when its answer has been paused, or at random."""
    coalescer = tier.batcher.coalescer
    dice = random.Random(limit)
    pauses = 0

    async def read(job: Job) -> tuple[list[int], list[float]]:
        nonlocal pauses
        ids: list[int] = []
        logprobs: list[float] = []
        with coalescer.admitted(job):
            while True:
                if dice.random() < 0.8:
                    await eventually(lambda: job in coalescer.paused or job.inbox.closed)
                    pauses += job in coalescer.paused
                assert job.inbox.unread <= limit
                arrival = await coalescer.take(job)
                ids += arrival.ids
                logprobs += [score for score in arrival.scores if isinstance(score, float)]
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
    """Open a channel that buffers little beyond what is read from it."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield channel


LONG = 3000


async def paused(tier: Tier) -> admin.BatcherState:
    """Wait until an answer is paused and its buffers are full. Returns the state of the batcher then."""
    same, last = 0, admin.SequenceState()
    async with (
        asyncio.timeout(PATIENCE),
        grpc.aio.insecure_channel(f"127.0.0.1:{tier.batcher.server.port}") as channel,
    ):
        while True:
            state = (await AdminServiceStub(channel).Inspect(admin.InspectRequest())).batcher
            now = state.sequences[0] if state.sequences else admin.SequenceState()
            now.ClearField("age")
            # A write that is not blocked makes progress while the batcher responds this many times.
            same = same + 1 if now.paused and now == last else 0
            if same == 30:
                return state
            last = now


async def test_an_answer_paused_for_its_reader_holds_no_slot_and_is_completed_later(
    count: Callable[..., float],
) -> None:
    paused_before, wasted = (
        count("headrace.sequences.paused"),
        count("headrace.tokens.wasted", cause="slow_reader"),
    )
    async with running_tier(
        [EchoEngine(max_running=1)], max_unread_tokens=200, max_unread_seconds=600, max_tokens=LONG
    ) as tier:
        ask = prompt("abcdefg ", max_tokens=LONG, ignore_eos=True)
        async with narrow(tier.batcher.server.port) as channel:
            call = GenerationServiceStub(channel).Generate(ask)
            responses = aiter(call)
            await anext(responses)
            seen = await paused(tier)
            # The worker runs one sequence at a time, and is free for others now.
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
    assert count("headrace.sequences.paused") > paused_before
    assert count("headrace.tokens.wasted", cause="slow_reader") - wasted == finish.usage.wasted_tokens


async def test_a_caller_that_never_reads_receives_slow_reader_and_can_resume() -> None:
    async with running_tier(
        [EchoEngine()], max_unread_tokens=200, max_unread_seconds=0.5, max_tokens=LONG
    ) as tier:
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


async def test_the_client_resumes_a_slow_readers_answer_after_the_server_ended_it() -> None:
    async with running_tier(
        [EchoEngine()], max_unread_tokens=200, max_unread_seconds=0.5, max_tokens=LONG
    ) as tier:
        ask = prompt("abcdefg ", max_tokens=LONG, ignore_eos=True)
        coalescer = tier.batcher.coalescer
        async with narrow(tier.batcher.server.port) as channel:
            stream = Client(channel).generate(ask, timeout=PATIENCE)
            async with aclosing(stream) as responses:
                await anext(responses)
                await eventually(lambda: not coalescer.live)
                text = "".join([response.delta.text async for response in responses])

    assert text == ("abcdefg " * LONG)[:LONG]


async def test_a_deadline_ends_a_paused_answer_before_the_unread_timeout() -> None:
    async with (
        running_tier([EchoEngine()], max_unread_tokens=200, max_unread_seconds=600, max_tokens=LONG) as tier,
        narrow(tier.batcher.server.port) as channel,
    ):
        ask = prompt("abcdefg ", max_tokens=LONG, ignore_eos=True)
        coalescer = tier.batcher.coalescer
        # On a very busy machine the deadline may pass before the first pause, or even before the first token.
        # The call ends then, too.
        call = GenerationServiceStub(channel).Generate(ask, timeout=5.0)
        with suppress(grpc.aio.AioRpcError):
            await anext(aiter(call))
            await eventually(lambda: coalescer.paused or not coalescer.live)
        await eventually(lambda: not coalescer.live)
        assert not coalescer.paused
        await eventually(lambda: not tier.batcher.server.requests.in_flight)
        await eventually(lambda: not any(link.outstanding for link in coalescer.pool))
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stopping_batcher_fails_paused_answers() -> None:
    async with (
        running_tier([EchoEngine()], max_unread_tokens=200, max_unread_seconds=600, max_tokens=LONG) as tier,
        narrow(tier.batcher.server.port) as channel,
    ):
        ask = prompt("abcdefg ", max_tokens=LONG, ignore_eos=True)
        responses = aiter(GenerationServiceStub(channel).Generate(ask))
        await anext(responses)
        await paused(tier)
        tier.batcher.coalescer.stop()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in responses:
                pass

    assert isinstance(statuses.from_rpc_error(ended.value), errors.Draining)
