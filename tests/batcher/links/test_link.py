"""A link accepts only current messages of its worker, and reports the sequences that it loses."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import grpc
import pytest
from opentelemetry import trace

from headrace import errors, statuses
from headrace.batcher.inbox import Inbox, SequenceEnd
from headrace.batcher.job import Job
from headrace.batcher.links.link import WorkerLink
from headrace.batcher.links.liveness import UNKNOWN_SECONDS, Liveness
from headrace.batcher.links.receiver import Receiver
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.channel import MAX_MESSAGE_BYTES
from headrace.deadline import NEVER
from headrace.flushing import Flusher
from headrace.runtime.breaker import BreakerState
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Mesh, collect, eventually, prompt
from tests.tier import running_tier


def job(*, attempt: int = 0, max_unread_tokens: int = 1000, request_id: str = "r") -> Job:
    return Job(
        request_id=request_id,
        prompt_ids=[1],
        resume_ids=[],
        sampling=pb.Sampling(seed=1, max_tokens=9),
        arrived=0.0,
        deadline=NEVER,
        priority=5,
        attempt=attempt,
        inbox=Inbox(Flusher(), limit=max_unread_tokens),
        span=trace.INVALID_SPAN,
    )


class Recorder:
    """A listener that records events."""

    def __init__(self) -> None:
        self.ends: list[tuple[Job, SequenceEnd]] = []
        self.failures: list[tuple[Job, errors.HeadraceError]] = []
        self.stopped: list[Job] = []
        self.cached: list[tuple[Job, int]] = []
        self.changes = 0

    def changed(self) -> None:
        self.changes += 1

    def stepped(self, now: float) -> None:
        pass

    def ended(self, link: WorkerLink, job: Job, end: SequenceEnd) -> None:
        self.ends.append((job, end))

    def failed(self, link: WorkerLink, job: Job, error: errors.HeadraceError) -> None:
        self.failures.append((job, error))

    def prefilled(self, link: WorkerLink, job: Job, cached: int, *, used_cache: bool) -> None:
        self.cached.append((job, cached))

    def inbox_full(self, link: WorkerLink, job: Job) -> None:
        link.cancel(job)
        self.stopped.append(job)

    def dropped(self, job: Job, tokens: int) -> None:
        pass

    def cache_lost(self, link: WorkerLink) -> None:
        pass


def connected(*jobs: Job, listener: Recorder | None = None) -> WorkerLink:
    """Return a link that was welcomed and has submitted *jobs*, with handles from 0."""
    link = WorkerLink("nowhere", fingerprint="f", batcher_id="b", listener=listener or Recorder())
    model = wire.ModelDescription(tokenizer_fingerprint="f", max_running=8)
    link.receiver.handle(wire.RunResponse(welcome=wire.Welcome(model=model, credit=wire.Credit(sequences=8))))
    link.submit(list(jobs), trace.INVALID_SPAN, 0.0)
    return link


def delta(link: WorkerLink, **fields: object) -> None:
    step = wire.Step(deltas=[wire.SequenceDelta(**fields)])  # type: ignore[arg-type]
    link.receiver.handle(wire.RunResponse(step=step))


class EndingStub:
    """A worker whose streams end before the welcome: each other time gRPC loses its reason."""

    def __init__(self, channel: object) -> None:
        self._calls = 0

    def Run(self) -> EndingStub:
        self._calls += 1
        return self

    async def write(self, request: wire.RunRequest) -> None:
        code, details = grpc.StatusCode.UNAVAILABLE, "the model is still loading"
        if self._calls % 2 == 0:
            code, details = grpc.StatusCode.INTERNAL, statuses.BROKE_IN_WRITE
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)

    def cancel(self) -> None:
        pass


async def test_a_reason_that_is_not_new_is_not_logged_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("headrace.batcher.links.link.WorkerServiceStub", EndingStub)
    monkeypatch.setattr("headrace.batcher.links.link.RECONNECT_SECONDS", (0.0, 0.0))
    caplog.set_level("INFO", logger="headrace.batcher.links.link")
    link = WorkerLink("127.0.0.1:1", fingerprint="f", batcher_id="b", listener=Recorder())
    running = asyncio.create_task(link.run())
    await eventually(lambda: link.epoch >= 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    (line,) = [one for one in caplog.records if one.message == "worker not connected"]
    assert line.problem == "the model is still loading"  # type: ignore[attr-defined]


async def test_repeated_tokens_are_dropped() -> None:
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


async def test_a_handle_is_reused_only_after_its_sequence_has_ended() -> None:
    one, two, three = job(), job(), job()
    link = connected(one)
    assert link.cancel(one)
    link.submit([two], trace.INVALID_SPAN, 0.0)
    assert link.in_flight.handle(two) == 1, "0 still belongs to the cancelled one"
    delta(link, handle=0, offset=0, token_ids=[4], finish=pb.FINISH_REASON_CANCELLED)
    link.submit([three], trace.INVALID_SPAN, 0.0)

    assert link.in_flight.handle(three) == 0
    assert link.outstanding == 2


async def test_steps_report_a_change_only_if_the_queue_may_wait_for_it() -> None:
    one, listener = job(), Recorder()
    link = connected(one, listener=listener)
    at = listener.changes
    delta(link, handle=0, offset=0, token_ids=[5])
    assert listener.changes == at + 1, "its prompt is computed"
    delta(link, handle=0, offset=1, token_ids=[6])
    assert listener.changes == at + 1
    link.suspect = True
    delta(link, handle=0, offset=2, token_ids=[7])
    assert listener.changes == at + 2, "the worker is ready again"
    delta(link, handle=0, offset=3, finish=pb.FINISH_REASON_STOP)
    assert listener.changes == at + 3, "a slot is free"


async def test_a_worker_of_unknown_speed_may_take_long_for_a_long_prompt() -> None:
    one = job()
    one.prompt_ids[:] = [1] * 1000
    one.uncached = 1000
    link = connected(one)
    assert link.prompt_seconds == 0, "its steps are short"
    assert link.model is not None
    link.model.step_tokens = 500
    assert link.prompt_seconds == 2.5
    link.in_flight.backlog += 99_000
    link.model.step_tokens = 99_000
    assert link.prompt_seconds == UNKNOWN_SECONDS, "a hang must be noticed"
    link.in_flight.backlog -= 99_000
    link.model.step_tokens = 500
    link.load = wire.Load(prefill_tokens_per_second=5000)
    assert link.prompt_seconds == 0.1
    delta(link, handle=0, offset=0, token_ids=[5])
    assert link.prompt_seconds == 0


async def test_only_the_newest_credit_counts() -> None:
    link = connected()
    link.receiver.handle(wire.RunResponse(credit=wire.Credit(generation=3, sequences=5)))
    link.receiver.handle(wire.RunResponse(credit=wire.Credit(generation=2, sequences=50)))

    assert link.free_slots(0.0) == 5


async def test_a_refused_sequence_fails_with_its_reason() -> None:
    one, listener = job(), Recorder()
    link = connected(one, listener=listener)
    verdict = wire.Verdict(
        handle=0,
        state=wire.ADMISSION_STATE_REFUSED,
        error=statuses.to_status(errors.ContextTooLong("too long")),
    )
    link.receiver.handle(wire.RunResponse(admission=wire.Admission(verdicts=[verdict])))

    ((failed, error),) = listener.failures
    assert failed is one
    assert isinstance(error, errors.ContextTooLong)
    assert link.outstanding == 0


async def test_late_tokens_of_an_abandoned_sequence_are_counted_as_wasted() -> None:
    one = job()
    link = connected(one)
    delta(link, handle=0, offset=0, token_ids=[5])
    link.cancel(one)
    one.attempt = 1
    delta(link, handle=0, attempt=0, offset=1, token_ids=[6, 7])

    assert one.generated == [5]
    assert one.history.wasted == 2


async def test_a_full_inbox_cancels_its_job_and_excess_tokens_are_dropped() -> None:
    one, listener = job(max_unread_tokens=3), Recorder()
    link = connected(one, listener=listener)
    delta(link, handle=0, offset=0, token_ids=[1, 2, 3, 4])

    assert listener.stopped == [one]
    assert (await one.inbox.take()).ids == one.generated == [1, 2, 3]
    assert one.history.wasted == 1


async def test_an_answer_whose_end_fits_the_inbox_is_not_stopped() -> None:
    one, listener = job(max_unread_tokens=3), Recorder()
    link = connected(one, listener=listener)
    delta(link, handle=0, offset=0, token_ids=[1, 2, 3], finish=pb.FINISH_REASON_STOP)

    assert not listener.stopped
    assert [ended for ended, _ in listener.ends] == [one]


async def test_an_end_after_dropped_tokens_does_not_count() -> None:
    one, listener = job(max_unread_tokens=3), Recorder()
    link = connected(one, listener=listener)
    delta(link, handle=0, offset=0, token_ids=[1, 2, 3, 4], finish=pb.FINISH_REASON_STOP)

    assert listener.stopped == [one]
    assert not listener.ends
    assert link.outstanding == 0, "the handle is free nevertheless"


async def test_cached_tokens_are_reported_once_with_the_first_token() -> None:
    one, listener = job(), Recorder()
    link = connected(one, listener=listener)
    delta(link, handle=0, offset=0, token_ids=[1], cached_tokens=16)
    delta(link, handle=0, offset=1, token_ids=[2])

    assert listener.cached == [(one, 16)]


async def test_new_credit_is_acknowledged_after_batches_sent_under_the_old() -> None:
    one = job()
    link = connected()
    link.submit([one], trace.INVALID_SPAN, 0.0)
    link.receiver.handle(wire.RunResponse(credit=wire.Credit(generation=4, sequences=1)))

    sent = []
    while not link._outgoing.empty():
        message = link._outgoing.get_nowait()
        assert message is not None
        sent.append((len(message.submit.sequences), message.ack.credit_generation))
    assert sent[-2:] == [(1, 0), (0, 4)]


async def test_a_batch_too_large_for_one_message_is_sent_in_parts() -> None:
    large = pb.Sampling(seed=1, max_tokens=9, logit_bias=dict.fromkeys(range(200_000), 1.0))
    jobs = [job() for _ in range(12)]
    for one in jobs:
        one.sampling = large
    link = connected(*jobs)

    handles: list[int] = []
    while not link._outgoing.empty():
        message = link._outgoing.get_nowait()
        assert message is not None
        assert message.ByteSize() < MAX_MESSAGE_BYTES
        handles += [sequence.handle for sequence in message.submit.sequences]
    assert handles == list(range(12))


async def test_every_eighth_frame_is_acknowledged() -> None:
    link = connected()
    link._outgoing.get_nowait()
    for frame in range(1, 17):
        link.receiver.handle(wire.RunResponse(step=wire.Step(frame=frame)))

    acks = []
    while not link._outgoing.empty():
        message = link._outgoing.get_nowait()
        assert message is not None
        acks.append(message.ack.frame)
    assert acks == [8, 16]


async def test_sequences_of_a_lost_stream_are_reported_once_and_their_handles_freed() -> None:
    one, two, listener = job(), job(), Recorder()
    link = connected(one, two, listener=listener)
    link.cancel(two)
    link._fail_in_flight()

    assert [(failed, error.reason) for failed, error in listener.failures] == [(one, "WORKER_LOST")]
    assert link.outstanding == 0


def broken(*jobs: Job) -> WorkerLink:
    """Return a link with a half-open breaker that has sent *jobs* as the probe."""
    link = connected()
    for _ in range(link.breaker.threshold):
        link.breaker.record_fault(0.0)
    assert link.free_slots(60.0) == 1
    link.submit(list(jobs), trace.INVALID_SPAN, 60.0)
    assert link.free_slots(60.0) == 0, "one probe at a time"
    return link


async def test_a_probe_that_is_handed_back_or_refused_allows_another() -> None:
    link = broken(job())
    error = statuses.to_status(errors.WorkerDraining("stopping"))
    delta(link, handle=0, error=error)
    assert link.free_slots(60.0) == 1

    link = broken(job())
    delta(link, handle=0, finish=pb.FINISH_REASON_CANCELLED)
    assert link.free_slots(60.0) == 1

    link = broken(job())
    verdict = wire.Verdict(handle=0, state=wire.ADMISSION_STATE_REFUSED, error=error)
    link.receiver.handle(wire.RunResponse(admission=wire.Admission(verdicts=[verdict])))
    assert link.free_slots(60.0) == 1


async def test_a_probe_lost_with_its_stream_allows_another() -> None:
    link = broken(job())
    link.receiver.handle(wire.RunResponse(drain=wire.Drain()))
    link._fail_in_flight()
    link.draining = False

    assert link.free_slots(60.0) == 1


FAULT = statuses.to_status(errors.SequenceFault("the logits are not finite"))


async def test_a_request_that_fails_repeatedly_opens_no_breaker() -> None:
    link = connected()
    for attempt in range(10):
        one = job(attempt=attempt)
        link.submit([one], trace.INVALID_SPAN, 0.0)
        delta(link, handle=0, attempt=attempt, error=FAULT)

    assert link.breaker.state(0.0) is BreakerState.CLOSED


async def test_a_step_that_fails_all_its_sequences_is_one_fault() -> None:
    link = connected(*[job(request_id=f"{number}") for number in range(8)])
    failed = wire.Step(deltas=[wire.SequenceDelta(handle=handle, error=FAULT) for handle in range(8)])
    link.receiver.handle(wire.RunResponse(step=failed))

    assert link.breaker.state(0.0) is BreakerState.CLOSED


async def test_faults_of_different_requests_open_the_breaker() -> None:
    link = connected()
    for number in range(link.breaker.threshold):
        link.submit([job(request_id=f"{number}")], trace.INVALID_SPAN, 0.0)
        delta(link, handle=0, error=FAULT)

    assert link.breaker.state(time.monotonic()) is BreakerState.OPEN


async def test_losses_with_the_same_request_in_flight_count_once() -> None:
    link = connected()
    for attempt in range(5):
        link.submit([job(attempt=attempt)], trace.INVALID_SPAN, 0.0)
        link._fail_in_flight()

    assert link.breaker.state(time.monotonic()) is BreakerState.CLOSED


async def test_tokens_that_the_model_cannot_generate_break_the_stream() -> None:
    link = connected(job())
    link.model = wire.ModelDescription(vocabulary_size=10)
    with pytest.raises(errors.WorkerLost, match="vocabulary"):
        delta(link, handle=0, offset=0, token_ids=[10])

    link = connected(job())
    with pytest.raises(errors.WorkerLost, match="at most 9"):
        delta(link, handle=0, offset=0, token_ids=[1] * 10)

    link = connected(job())
    with pytest.raises(errors.WorkerLost, match="no reason"):
        delta(link, handle=0, offset=0, token_ids=[1], finish=77)

    asked = job()
    asked.sampling.logprobs = True
    link = connected(asked)
    with pytest.raises(errors.WorkerLost, match="log-probabilities"):
        delta(link, handle=0, offset=0, token_ids=[1, 2], logprobs=[0.5])


class Odd(WorkerServiceServicer):
    """A worker that sends a welcome and then an invalid message."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.streams = 0

    async def GetModel(self, request: wire.GetModelRequest, context: object) -> wire.GetModelResponse:
        raise NotImplementedError

    async def Run(self, requests, context):  # type: ignore[no-untyped-def]
        self.streams += 1
        hello = (await anext(aiter(requests))).hello
        model = wire.ModelDescription(
            tokenizer_fingerprint=self.fingerprint, context_length=100, vocabulary_size=258, max_running=4
        )
        yield wire.RunResponse(
            welcome=wire.Welcome(epoch=hello.epoch, model=model, credit=wire.Credit(sequences=4))
        )
        async for request in requests:
            if request.HasField("submit"):
                (sequence,) = request.submit.sequences
                beyond = wire.SequenceDelta(handle=sequence.handle, token_ids=[4_000_000_000])
                yield wire.RunResponse(step=wire.Step(frame=1, deltas=[beyond]))


async def test_an_invalid_message_of_one_worker_does_not_affect_the_others() -> None:
    server = grpc.aio.server()
    odd = Odd(ByteTokenizer().fingerprint)
    add_WorkerServiceServicer_to_server(odd, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with running_tier([EchoEngine()], extra_workers=[f"127.0.0.1:{port}"]) as tier:
        await eventually(lambda: len(tier.batcher.coalescer.pool.ready()) == 2)
        answers = await asyncio.gather(*(collect(tier.client, prompt(f"honest {n}")) for n in range(8)))

        assert [answer.text for answer in answers] == [f"honest {n}" for n in range(8)]
        assert odd.streams
    await server.stop(0)


async def test_an_unexpected_error_in_a_link_is_handled_as_a_lost_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_tier([EchoEngine(step_seconds=0.005)]) as tier:
        (link,) = tier.batcher.coalescer.pool
        answer = asyncio.create_task(
            collect(tier.client, prompt("on and on", ignore_eos=True, max_tokens=200))
        )
        await eventually(lambda: link.outstanding)
        first = link.epoch

        def fails(*_: object) -> None:
            raise RuntimeError("planned")

        for count, (owner, name) in enumerate(((Receiver, "_handle_step"), (Liveness, "lost")), 1):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fails)
                await eventually(partial(lambda least: link.epoch >= least, first + count))
            await eventually(lambda: link.ready)

        assert (await answer).tokens == 200


async def test_a_stream_that_does_not_start_with_hello_is_rejected(mesh: Mesh) -> None:
    from headrace.channel import open_channel
    from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub

    port = mesh.tiers["small"].worker.server.port
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = WorkerServiceStub(channel).Run(iter([wire.RunRequest(ping=wire.Ping())]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass

    assert isinstance(statuses.from_rpc_error(caught.value), errors.InvalidRequest)


async def test_a_link_that_is_cancelled_while_its_stream_breaks_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a batcher that is stopped while its worker dies would reconnect for ever and not end."""
    link = WorkerLink("127.0.0.1:1", fingerprint="", batcher_id="b", listener=Recorder())
    begun = asyncio.Event()

    async def breaks(stub: object) -> None:
        begun.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(failing())
            await asyncio.Event().wait()

    async def failing() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise errors.WorkerLost("the stream broke")

    monkeypatch.setattr(link, "_serve_stream", breaks)
    running = asyncio.create_task(link.run())
    await begun.wait()
    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, PATIENCE)
