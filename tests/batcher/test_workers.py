"""The link to a worker believes only what is current, and loses nothing when the stream breaks."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from opentelemetry import trace

from headrace import errors
from headrace.batcher.job import Flush, Inbox, Job
from headrace.batcher.workers import WorkerLink
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.engine.echo import EchoEngine
from tests.harness import Mesh, collect, eventually, prompt, running_mesh


def job(*, attempt: int = 0) -> Job:
    return Job(
        request_id="r",
        prompt_ids=[1],
        resume_ids=[],
        sampling=pb.Sampling(seed=1, max_tokens=9),
        arrived=0.0,
        expires=None,
        priority=5,
        attempt=attempt,
        inbox=Inbox(Flush()),
        span=trace.INVALID_SPAN,
    )


def connected(*jobs: Job) -> WorkerLink:
    """A link that was welcomed and has submitted *jobs*, with handles from 0."""
    link = WorkerLink("nowhere", fingerprint="f", batcher_id="b")
    model = wire.ModelDescription(tokenizer_fingerprint="f", max_running=8)
    link._take(wire.RunResponse(welcome=wire.Welcome(model=model, credit=wire.Credit(sequences=8))))
    link.submit(list(jobs), trace.INVALID_SPAN, 0.0)
    return link


def delta(link: WorkerLink, **fields: object) -> None:
    step = wire.Step(deltas=[wire.SequenceDelta(**fields)])  # type: ignore[arg-type]
    link._take(wire.RunResponse(step=step))


async def test_tokens_that_were_seen_before_are_dropped() -> None:
    one = job()
    link = connected(one)
    delta(link, handle=0, offset=0, token_ids=[5, 6])
    delta(link, handle=0, offset=1, token_ids=[6, 7])

    assert (await one.inbox.take()).ids == [5, 6, 7]


async def test_a_gap_breaks_the_stream() -> None:
    link = connected(job())

    with pytest.raises(errors.WorkerLost, match="skipped"):
        delta(link, handle=0, offset=1, token_ids=[6])


async def test_deltas_of_other_attempts_and_unknown_handles_are_ignored() -> None:
    one = job(attempt=1)
    link = connected(one)
    delta(link, handle=0, attempt=0, offset=0, token_ids=[9], finish=pb.FINISH_REASON_STOP)
    delta(link, handle=77, offset=0, token_ids=[9])
    delta(link, handle=0, attempt=1, offset=0, token_ids=[5])

    assert (await one.inbox.take()).ids == [5]
    assert link.outstanding == 1


async def test_a_handle_is_reused_only_after_the_last_word_on_it() -> None:
    one, two, three = job(), job(), job()
    link = connected(one)
    assert link.cancel(one)
    link.submit([two], trace.INVALID_SPAN, 0.0)
    assert link._handles[two] == 1, "0 is still the cancelled one's"
    delta(link, handle=0, offset=0, token_ids=[4], finish=pb.FINISH_REASON_CANCELLED)
    link.submit([three], trace.INVALID_SPAN, 0.0)

    assert link._handles[three] == 0
    assert link.outstanding == 2


async def test_only_the_newest_credit_counts() -> None:
    link = connected()
    link._take(wire.RunResponse(credit=wire.Credit(generation=3, sequences=5)))
    link._take(wire.RunResponse(credit=wire.Credit(generation=2, sequences=50)))

    assert link.room == 5


async def test_a_refused_sequence_gets_its_reason() -> None:
    one = job()
    link = connected(one)
    verdict = wire.Verdict(
        handle=0,
        state=wire.ADMISSION_STATE_REFUSED,
        error=errors.to_status(errors.ContextTooLong("too long")),
    )
    link._take(wire.RunResponse(admission=wire.Admission(verdicts=[verdict])))

    with pytest.raises(errors.ContextTooLong):
        await one.inbox.take()
    assert link.outstanding == 0


async def test_a_worker_that_dies_is_told_and_a_new_one_is_found() -> None:
    """The stream breaks in mid-answer; the link dials until somebody is there again."""
    async with running_mesh("only", engine=lambda: EchoEngine(step_seconds=0.01)) as mesh:
        (link,) = mesh.tiers["only"].batcher.coalescer.links
        reading = asyncio.create_task(collect(mesh.client, prompt("x", max_tokens=900, ignore_eos=True)))
        await eventually(lambda: link.outstanding)
        await hang_up(mesh)

        with pytest.raises(errors.WorkerLost):
            await reading
        await eventually(lambda: link.ready)
        assert (await collect(mesh.client, prompt("again"))).text == "again"
        await eventually(lambda: not mesh.left_behind)


async def hang_up(mesh: Mesh) -> None:
    """End the worker's `Run` stream from the batcher's side, as a broken connection would."""
    (link,) = mesh.tiers["only"].batcher.coalescer.links
    link._outgoing.put_nowait(wire.RunRequest(hello=wire.Hello()))  # a second hello is an error


async def test_a_stream_that_does_not_begin_with_hello_is_refused(mesh: Mesh) -> None:
    from headrace.client import open_channel
    from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub

    port = mesh.tiers["small"].worker.server.port
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = WorkerServiceStub(channel).Run(iter([wire.RunRequest(ping=wire.Ping())]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass

    assert isinstance(errors.from_rpc_error(caught.value), errors.InvalidRequest)
