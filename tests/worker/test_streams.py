"""A stream merges frames for a batcher that reads slowly, and sends heartbeats when it has no tokens."""

from __future__ import annotations

from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.stream import HEARTBEAT_SECONDS, BatcherStream, InFlightSequence


def add_tokens(stream: BatcherStream, offset: int, *ids: int) -> None:
    delta = stream.pending.get(0)
    if delta is None:
        delta = stream.pending[0] = wire.SequenceDelta(handle=0, offset=offset)
    delta.token_ids.extend(ids)


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
    stream.heartbeat(0.0)
    assert frames(stream) == [], "the stream has no sequence"

    stream.in_flight[0] = object.__new__(InFlightSequence)
    sent = 0
    for step in range(100):
        now = 10 + step * HEARTBEAT_SECONDS / 10
        stream.heartbeat(now)
        sent += len(frames(stream, now))
    assert 9 <= sent <= 11
