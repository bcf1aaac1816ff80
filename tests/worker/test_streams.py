"""A stream merges frames for a batcher that reads slowly, and sends heartbeats when it has no tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from opentelemetry import trace

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.runner import (
    FinishReason,
    PromptLogprobs,
    SamplingParams,
    SequenceSpec,
    SequenceUpdate,
    TopTokens,
)
from headrace.worker.sequences import PART_BYTES, InFlightSequence
from headrace.worker.stream import FRAME_BYTES, HEARTBEAT_SECONDS, BatcherStream


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


def scored_stream(
    prompt: int = 4000, most: int = 20, *, handles: int = 1, window: int = 0, top: int = 0
) -> BatcherStream:
    """Return a stream whose sequences ask for the log-probabilities of their prompts."""
    stream = BatcherStream(1, window=window)
    none = trace.INVALID_SPAN_CONTEXT
    params = SamplingParams(seed=0, max_tokens=200, prompt_logprobs=most, top_logprobs=top)
    for handle in range(handles):
        spec = SequenceSpec((1, handle), [1] * prompt, prompt, params)
        stream.check_room(spec)
        sequence = InFlightSequence(spec, "", 1, parent=none, batch=none, submitted_ns=0)
        stream.add_sequence(handle, sequence)
    return stream


def likely(most: int, first: int = 70_000) -> TopTokens:
    return TopTokens(range(first, first + most), [-float(rank) for rank in range(most)])


def add_part(stream: BatcherStream, offset: int, tokens: int, most: int = 20, *, handle: int = 0) -> None:
    part = PromptLogprobs(
        offset, [-float(offset + index) for index in range(tokens)], [likely(most)] * tokens if most else ()
    )
    stream.add_update(SequenceUpdate((1, handle), 0, prompt=part), 5)
    stream.announce(0.0, stepped=True)


def end(stream: BatcherStream, *, handle: int = 0) -> None:
    update = SequenceUpdate((1, handle), 0, [7], [-1.0], finish=FinishReason.LENGTH)
    stream.add_update(update, 6)
    stream.announce(0.0, stepped=True)


def drained(stream: BatcherStream) -> list[wire.Step]:
    """Read like a batcher that acknowledges each frame, until nothing is left."""
    read = []
    while stream.has_unsent.is_set():
        for step in frames(stream):
            read.append(step)
            stream.acknowledge_frames(step.frame)
    return read


def test_a_long_prompt_is_sent_in_frames_of_a_limited_size_before_its_first_token() -> None:
    """No batcher reads it meanwhile, which does not end its stream."""
    stream = scored_stream(8192, window=4)
    for offset in range(1, 8192, 512):
        add_part(stream, offset, min(512, 8192 - offset))
    end(stream)
    assert stream.error is None

    steps = drained(stream)

    deltas = [delta for step in steps for delta in step.deltas]
    parts = [delta.prompt for delta in deltas if delta.HasField("prompt")]
    assert [value for part in parts for value in part.logprobs] == [-float(place) for place in range(1, 8192)]
    assert [part.offset for part in parts] == [int(-part.logprobs[0]) for part in parts]
    assert all(len(part.top) == len(part.logprobs) for part in parts)
    assert list(parts[-1].top[-1].ids) == list(range(70_000, 70_020))
    assert max(part.ByteSize() for part in parts) <= PART_BYTES
    assert max(step.ByteSize() for step in steps) <= FRAME_BYTES + PART_BYTES
    assert list(deltas[-1].token_ids) == [7]
    assert deltas[-1].finish == pb.FINISH_REASON_LENGTH
    assert all(not delta.token_ids and not delta.finish for delta in deltas[:-1])
    assert not stream.pending
    assert stream.held == 0


def test_tokens_of_other_sequences_do_not_wait_for_a_long_prompt() -> None:
    stream = scored_stream(handles=2)
    add_part(stream, 1, 3999)
    add_tokens(stream, 0, 5, handle=7)

    first, *rest = drained(stream)

    assert [list(delta.token_ids) for delta in first.deltas if delta.handle == 7] == [[5]]
    assert len(rest) > 3


def test_long_prompts_take_turns() -> None:
    stream = scored_stream(handles=2)
    for handle in (0, 1):
        add_part(stream, 1, 3999, handle=handle)

    steps = drained(stream)

    handles = [{delta.handle for delta in step.deltas} for step in steps]
    assert handles[:4] == [{0}, {1}, {0}, {1}]
    for handle in (0, 1):
        offsets = [delta.prompt.offset for step in steps for delta in step.deltas if delta.handle == handle]
        assert offsets == sorted(set(offsets))


def test_memory_for_prompts_is_reserved_until_they_are_sent() -> None:
    stream = scored_stream(80_000)  # more than half of what may be reserved
    spec = stream.in_flight[0].spec
    with pytest.raises(errors.Overloaded, match="prompt_logprobs"):
        stream.check_room(spec)

    add_part(stream, 1, 9)
    drained(stream)
    with pytest.raises(errors.Overloaded, match="prompt_logprobs"):
        stream.check_room(spec)
    stream.check_room(replace(spec, params=replace(spec.params, prompt_logprobs=None)))

    end(stream)
    drained(stream)
    stream.check_room(spec)


def test_a_sequence_that_ends_without_a_part_of_its_prompt_releases_what_is_reserved() -> None:
    stream = scored_stream(80_000)
    spec = stream.in_flight[0].spec
    stream.add_update(SequenceUpdate((1, 0), 0, finish=FinishReason.CANCELLED), 0)
    stream.announce(0.0, stepped=False)
    drained(stream)

    stream.check_room(spec)


def test_the_most_likely_tokens_have_a_bound_of_their_own() -> None:
    """A batcher that stalls loses its stream as late as without them."""
    stream = scored_stream(2, top=20)
    for offset in range(20_000):
        update = SequenceUpdate((1, 0), offset, [5], [-1.0], top=[likely(20)])
        stream.add_update(update, 5)
    stream.announce(0.0, stepped=True)
    assert stream.error is None

    (step,) = drained(stream)
    assert len(step.deltas[0].top) == len(step.deltas[0].token_ids) == 20_000

    for offset in range(20_000, 100_000):
        stream.add_update(SequenceUpdate((1, 0), offset, [5], [-1.0], top=[likely(20)]), 5)
    stream.announce(0.0, stepped=True)
    assert isinstance(stream.error, errors.SlowReader)


def test_a_frame_has_a_limited_part_of_the_most_likely_tokens_and_all_other_tokens() -> None:
    stream = scored_stream(2, handles=3, top=20)
    for handle in range(3):
        for offset in range(300):
            stream.add_update(SequenceUpdate((1, handle), offset, [5], top=[likely(20)]), 5)
    add_tokens(stream, 0, 6, handle=9)

    steps = drained(stream)

    assert [[delta.handle for delta in step.deltas] for step in steps] == [[0, 9], [1], [2]]
