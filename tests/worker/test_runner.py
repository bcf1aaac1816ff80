"""The batchers' streams work over any `Runner`, here one without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.runner import (
    FinishReason,
    ModelInfo,
    SequenceSpec,
    SequenceTimes,
    SequenceUpdate,
    StepReport,
)
from headrace.worker.sequences import SequenceKey
from headrace.worker.stream import BatcherStream
from headrace.worker.streams import BatcherStreams
from tests.harness import PATIENCE

Report = StepReport[SequenceKey]


class ScriptedRunner:
    """Records what is submitted and cancelled; the test reports the steps."""

    def __init__(self) -> None:
        self.submitted: list[SequenceSpec[SequenceKey]] = []
        self.cancelled: list[SequenceKey] = []
        self.report: Callable[[Report], None]

    @property
    def model(self) -> ModelInfo:
        return replace(EchoEngine().model, name="scripted")

    @property
    def step_tokens(self) -> int:
        return 64

    @property
    def shared_block_tokens(self) -> int:
        return 0

    def start(self, report: Callable[[Report], None]) -> None:
        self.report = report

    def submit(self, *specs: SequenceSpec[SequenceKey]) -> None:
        self.submitted += specs

    def cancel(self, *keys: SequenceKey) -> None:
        self.cancelled += keys

    def stop(self) -> None:
        pass


def submit(streams: BatcherStreams, stream: BatcherStream, handle: int, **fields: object) -> None:
    sampling = pb.Sampling(seed=1, max_tokens=9)
    message = wire.Sequence(handle=handle, prompt_ids=[65, 66], sampling=sampling, **fields)  # type: ignore[arg-type]
    stream.send(streams.submit(stream, wire.Submit(batch_id=1, sequences=[message])))


async def deltas(stream: BatcherStream) -> list[wire.SequenceDelta]:
    await asyncio.sleep(0)  # the report is delivered on the event loop
    return [delta for response in stream.take_messages(0.0) for delta in response.step.deltas]


async def test_updates_of_a_runner_reach_their_stream_with_usage_and_timing() -> None:
    runner = ScriptedRunner()
    streams = BatcherStreams(runner)
    stream, other = (streams.open(wire.Hello(batcher_id=name, epoch=1)) for name in ("one", "other"))
    submit(streams, stream, 7, resume_ids=[70])
    (spec,) = runner.submitted
    assert (list(spec.ids), spec.prompt, spec.resumed) == ([65, 66, 70], 2, 1)

    first = SequenceUpdate(spec.key, 1, (71,), cached=2)
    runner.report(StepReport(updates=[first], rows=1, tokens=3, seconds=0.1, ended=1, running=1))
    (delta,) = await deltas(stream)
    assert (delta.handle, delta.offset, list(delta.token_ids), delta.cached_tokens) == (7, 1, [71], 2)

    times = SequenceTimes(spec.submitted + 1, spec.submitted + 3, spec.submitted + 6)
    last = SequenceUpdate(spec.key, 2, (72,), cached=2, finish=FinishReason.STOP, times=times)
    runner.report(StepReport(updates=[last], rows=1, tokens=1, decodes=1, seconds=0.1, ended=2))
    (delta,) = await deltas(stream)
    usage, timing = delta.usage, delta.timing
    assert (delta.offset, list(delta.token_ids), delta.finish) == (2, [72], pb.FINISH_REASON_STOP)
    assert (usage.prompt_tokens, usage.cached_tokens) == (2, 2)
    assert (usage.completion_tokens, usage.replayed_tokens) == (3, 1)
    assert [
        round(part.ToTimedelta().total_seconds()) for part in (timing.queue, timing.prefill, timing.decode)
    ] == [1, 2, 3]
    assert (streams.in_flight, await deltas(other)) == (0, [])


async def test_a_closed_stream_cancels_its_sequences_and_ignores_their_updates() -> None:
    runner = ScriptedRunner()
    streams = BatcherStreams(runner)
    stream = streams.open(wire.Hello(batcher_id="one", epoch=1))
    submit(streams, stream, 7)
    streams.close(stream)
    runner.report(StepReport(updates=[SequenceUpdate((stream.number, 7), 0, finish=FinishReason.CANCELLED)]))
    await asyncio.sleep(0)

    assert runner.cancelled == [(stream.number, 7)]
    assert len(streams) == 0


async def test_steps_that_end_while_the_event_loop_is_busy_are_delivered_together() -> None:
    runner = ScriptedRunner()
    streams = BatcherStreams(runner)
    stream = streams.open(wire.Hello(batcher_id="one", epoch=1))
    submit(streams, stream, 7)
    (spec,) = runner.submitted
    for offset in range(3):
        update = SequenceUpdate(spec.key, offset, (70 + offset,), cached=1)
        runner.report(StepReport(updates=[update], rows=1, tokens=1, seconds=0.1, ended=1, running=1))
    (delta,) = await deltas(stream)
    assert (delta.offset, list(delta.token_ids), delta.cached_tokens) == (0, [70, 71, 72], 1)

    last = SequenceUpdate(spec.key, 3, (73,), finish=FinishReason.STOP)
    runner.report(StepReport(updates=[last], rows=1, tokens=1, seconds=0.1, ended=2))
    (delta,) = await deltas(stream)
    assert (delta.offset, list(delta.token_ids), delta.finish) == (3, [73], pb.FINISH_REASON_STOP)


async def test_no_report_of_another_thread_is_lost() -> None:
    """Whether the event loop is about to deliver, delivers or waits when a report arrives."""
    runner = ScriptedRunner()
    streams = BatcherStreams(runner)
    stream = streams.open(wire.Hello(batcher_id="one", epoch=1))
    submit(streams, stream, 7)
    (spec,) = runner.submitted

    def report_all() -> None:
        for offset in range(5000):
            update = SequenceUpdate(spec.key, offset, (offset,))
            runner.report(StepReport(updates=[update], rows=1, tokens=1, seconds=0.1, ended=1, running=1))

    reporting = asyncio.create_task(asyncio.to_thread(report_all))
    received: list[int] = []
    async with asyncio.timeout(PATIENCE):
        while len(received) < 5000:
            for delta in await deltas(stream):
                assert delta.offset == len(received)
                received += delta.token_ids
    await reporting

    assert received == list(range(5000))
