"""A stream merges frames for a batcher that reads slowly, and sends heartbeats when it has no tokens."""

from __future__ import annotations

from opentelemetry import trace

from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec, SequenceUpdate
from headrace.worker.sequences import InFlightSequence
from headrace.worker.stream import HEARTBEAT_SECONDS, BatcherStream


def add_sequence(stream: BatcherStream, handle: int = 0) -> None:
    spec = SequenceSpec((stream.number, handle), [1, 2], 2, SamplingParams(seed=0, max_tokens=200))
    none = trace.INVALID_SPAN_CONTEXT
    stream.in_flight[handle] = InFlightSequence(spec, "", 1, parent=none, batch=none, submitted_ns=0)


def add_tokens(
    stream: BatcherStream, offset: int, *ids: int, finish: FinishReason | None = None, handle: int = 0
) -> None:
    if not offset:
        add_sequence(stream, handle)
    logprobs = [-float(id) for id in ids]
    stream.add_update(SequenceUpdate((stream.number, handle), offset, ids, logprobs, 1, finish), 5)
    stream.announce(0.0, stepped=True)


def frames(stream: BatcherStream, now: float = 0.0) -> list[wire.Step]:
    return [response.step for response in stream.take_messages(now) if response.HasField("step")]


def test_steps_are_merged_while_the_window_is_full_and_sent_together_after_an_ack() -> None:
    stream = BatcherStream(1, window=2)
    sent: list[int] = []
    for offset in range(10):
        add_tokens(stream, offset, offset)
        for step in frames(stream):
            sent += step.deltas[0].token_ids
    assert sent == [0, 1]

    stream.acknowledge_frames(1)
    (step,) = frames(stream)
    assert step.frame == 3
    assert (step.deltas[0].offset, list(step.deltas[0].token_ids)) == (2, [2, 3, 4, 5, 6, 7, 8, 9])


def test_a_window_of_zero_is_unbounded() -> None:
    stream = BatcherStream(1)
    for offset in range(100):
        add_tokens(stream, offset, offset)
        assert len(frames(stream)) == 1


def test_messages_that_are_not_steps_are_sent_while_the_window_is_full() -> None:
    stream = BatcherStream(1, window=1)
    add_tokens(stream, 0, 0)
    frames(stream)
    add_tokens(stream, 1, 1)
    stream.send(wire.RunResponse(pong=wire.Pong(nonce=4)))

    assert [response.WhichOneof("message") for response in stream.take_messages(0.0)] == ["pong"]


def test_an_ack_of_frames_that_were_never_sent_does_not_open_the_window() -> None:
    stream = BatcherStream(1, window=1)
    add_tokens(stream, 0, 0)
    frames(stream)
    stream.acknowledge_frames(1_000)
    add_tokens(stream, 1, 1)
    assert len(frames(stream)) == 1
    add_tokens(stream, 2, 2)
    assert frames(stream) == []


def test_heartbeats_are_sent_during_steps_without_tokens_so_that_prefill_is_not_taken_for_a_stall() -> None:
    stream = BatcherStream(1)
    stream.announce(0.0, stepped=True)
    assert frames(stream) == [], "the stream has no sequence"

    add_sequence(stream)
    sent = 0
    for step in range(100):
        now = 10 + step * HEARTBEAT_SECONDS / 10
        stream.announce(now, stepped=True)
        sent += len(frames(stream, now))
    assert 9 <= sent <= 11


def test_the_updates_of_a_merged_delta_are_complete_and_in_order() -> None:
    stream = BatcherStream(1)
    add_tokens(stream, 0, 7, 8)
    add_tokens(stream, 0, 3, handle=1)
    add_tokens(stream, 2, 9)
    add_tokens(stream, 3, finish=FinishReason.STOP)
    (step,) = frames(stream)
    first, second = step.deltas

    assert (first.handle, first.offset, list(first.token_ids)) == (0, 0, [7, 8, 9])
    assert list(first.logprobs) == [-7, -8, -9]
    assert (first.cached_tokens, first.finish) == (1, pb.FINISH_REASON_STOP)
    assert (first.usage.completion_tokens, second.usage.completion_tokens) == (3, 0)
    assert (second.handle, list(second.token_ids), second.finish) == (1, [3], 0)


def test_a_later_delta_contains_only_what_is_new() -> None:
    stream = BatcherStream(1)
    add_tokens(stream, 0, 7)
    frames(stream)
    add_tokens(stream, 1, 8)
    (step,) = frames(stream)
    (delta,) = step.deltas

    assert (delta.offset, list(delta.token_ids), list(delta.logprobs)) == (1, [8], [-8])
    assert not delta.HasField("cached_tokens")


def test_the_writer_is_not_resumed_while_the_window_is_full() -> None:
    stream = BatcherStream(1, window=1)
    add_tokens(stream, 0, 0)
    frames(stream)
    add_tokens(stream, 1, 1)
    assert not stream.has_unsent.is_set()

    stream.acknowledge_frames(1)
    assert stream.has_unsent.is_set()
