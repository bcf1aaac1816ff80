"""What a worker keeps for a batcher that is slow to hear, and what it says when there is nothing to say."""

from __future__ import annotations

from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.stream import BEAT_SECONDS, Flight, Session


def saying(session: Session, offset: int, *ids: int) -> None:
    delta = session.pending.get(0)
    if delta is None:
        delta = session.pending[0] = wire.SequenceDelta(handle=0, offset=offset)
    delta.token_ids.extend(ids)


def frames(session: Session, now: float = 0.0) -> list[wire.Step]:
    return [response.step for response in session.news(now) if response.HasField("step")]


def test_steps_are_merged_while_the_window_is_full_and_go_out_together_on_an_ack() -> None:
    session = Session(1, window=2)
    sent: list[int] = []
    for offset in range(10):
        saying(session, offset, offset)
        for step in frames(session):
            sent += step.deltas[0].token_ids
    assert sent == [0, 1]

    session.ack(1)
    (step,) = frames(session)
    assert step.frame == 3
    assert (step.deltas[0].offset, list(step.deltas[0].token_ids)) == (2, [2, 3, 4, 5, 6, 7, 8, 9])


def test_a_window_of_none_never_holds_back() -> None:
    session = Session(1)
    for offset in range(100):
        saying(session, offset, offset)
        assert len(frames(session)) == 1


def test_what_is_no_step_passes_a_full_window() -> None:
    session = Session(1, window=1)
    saying(session, 0, 0)
    frames(session)
    saying(session, 1, 1)
    session.say(wire.RunResponse(pong=wire.Pong(nonce=4)))

    assert [response.WhichOneof("message") for response in session.news(0.0)] == ["pong"]


def test_an_ack_of_frames_that_were_never_sent_opens_nothing() -> None:
    session = Session(1, window=1)
    saying(session, 0, 0)
    frames(session)
    session.ack(1_000)
    saying(session, 1, 1)
    assert len(frames(session)) == 1
    saying(session, 2, 2)
    assert frames(session) == []


def test_steps_without_tokens_are_told_now_and_then_so_that_prompts_are_not_taken_for_a_stall() -> None:
    session = Session(1)
    session.beat(0.0)
    assert frames(session) == [], "nothing of this stream is under way"

    session.flights[0] = object.__new__(Flight)
    told = 0
    for step in range(100):
        now = 10 + step * BEAT_SECONDS / 10
        session.beat(now)
        told += len(frames(session, now))
    assert 9 <= told <= 11
