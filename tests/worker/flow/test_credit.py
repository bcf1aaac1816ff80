"""Several batchers share a worker: few sequences wait there, and no batcher starves."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.flow.credit import IDLE_CREDIT, CreditState, capacity, fill, share
from headrace.worker.runner import SequenceSpec
from headrace.worker.sequences import InFlightSequence
from headrace.worker.stream import SILENT_SECONDS, BatcherStream


def states(draw: st.DrawFn) -> CreditState:
    held, credit, more = draw(st.integers(0, 40)), draw(st.integers(0, 40)), draw(st.integers(0, 10))
    return CreditState(held, credit, max(held, credit) + more, draw(st.booleans()) or held >= credit)


STREAMS = st.lists(st.composite(states)(), min_size=1, max_size=8)


@given(
    max_running=st.integers(1, 256),
    running=st.integers(0, 256),
    waiting=st.integers(0, 256),
    step_tokens=st.integers(1, 4096),
    mean_prompt=st.floats(0, 10_000),
)
def test_about_one_steps_prompts_may_wait(
    max_running: int, running: int, waiting: int, step_tokens: int, mean_prompt: float
) -> None:
    room = capacity(
        max_running=max_running,
        running=min(running, max_running),
        waiting=waiting,
        step_tokens=step_tokens,
        mean_prompt=mean_prompt,
    )
    slots = min(running, max_running) if waiting and running else max_running

    assert slots + 1 <= room <= slots + max_running
    if mean_prompt:
        assert room - slots <= max(step_tokens / mean_prompt, 1)


@given(room=st.integers(1, 100), streams=STREAMS)
def test_credit_is_never_granted_beyond_the_capacity(room: int, streams: list[CreditState]) -> None:
    granted = share(room, streams)

    before = sum(one.committed for one in streams)
    after = sum(max(one.committed, credit) for one, credit in zip(streams, granted, strict=True))
    assert after <= max(room, len(streams), before)


@given(room=st.integers(8, 100), streams=st.integers(2, 8))
def test_an_idle_stream_keeps_a_reserve_and_backlogged_ones_share_evenly(room: int, streams: int) -> None:
    idle = CreditState(held=0, credit=0, committed=0, backlogged=False)
    granted = settle(room, [idle, *[CreditState(0, 0, 0, backlogged=True)] * (streams - 1)])

    assert max(granted[1:]) - min(granted[1:]) <= 1
    assert room - room // 4 <= sum(granted) <= room, "all but its reserve"


@given(room=st.integers(1, 100), streams=st.integers(1, 64), working=st.integers(1, 4))
def test_idle_streams_withhold_no_credit_from_working_ones(room: int, streams: int, working: int) -> None:
    idle = CreditState(held=0, credit=0, committed=0, backlogged=False, idle=True)
    granted = settle(room, [*[idle] * streams, *[CreditState(0, 0, 0, backlogged=True)] * working])

    assert sum(granted[streams:]) == max(room, working)
    assert granted[:streams] == [IDLE_CREDIT] * streams, "each can still show that it is not idle"


def test_credit_of_an_idle_stream_is_withdrawn_when_a_backlogged_one_lacks_it() -> None:
    idle = CreditState(held=0, credit=6, committed=6, backlogged=False, idle=True)

    assert share(8, [idle, CreditState(2, 2, 2, backlogged=False)]) == [6, 2]
    assert share(8, [idle, CreditState(2, 2, 2, backlogged=True)]) == [IDLE_CREDIT, 3]


def test_while_no_stream_is_backlogged_idle_ones_share_a_quarter() -> None:
    new = CreditState(held=0, credit=0, committed=0, backlogged=False, idle=True)
    full = CreditState(held=2, credit=32, committed=32, backlogged=False)

    assert share(32, [full, new]) == [10, IDLE_CREDIT], "withdrawn, but not acknowledged yet"
    assert share(32, [CreditState(2, 10, 10, backlogged=False), new]) == [10, 8]
    assert share(32, [CreditState(2, 10, 10, backlogged=False), new, new]) == [10, 4, 4]


@given(room=st.integers(1, 60), streams=STREAMS)
def test_the_streams_with_least_credit_get_more_first(room: int, streams: list[CreditState]) -> None:
    """As if each unit went to the stream with least credit among those that lack some."""
    granted, due = [one.held for one in streams], [one.held + one.credit for one in streams]
    expected = list(granted)
    for _ in range(min(room, sum(due) - sum(granted))):
        lacking = [number for number, most in enumerate(due) if expected[number] < most]
        lowest = min(lacking, key=expected.__getitem__)
        expected[lowest] += 1

    assert fill(granted, due, min(room, sum(due) - sum(granted))) == expected


def test_sharing_a_large_capacity_takes_no_longer() -> None:
    backlogged = CreditState(0, 0, 0, backlogged=True)

    assert share(10**12, [backlogged] * 3) == [(10**12 + 2) // 3, 10**12 // 3, 10**12 // 3]


def settle(room: int, streams: list[CreditState]) -> list[int]:
    """Return the grants in the end, if all streams use their credit and acknowledge what they lose."""
    for _ in range(10):
        granted = share(room, streams)
        streams = [
            CreditState(credit if one.backlogged else one.held, credit, credit, one.backlogged, one.idle)
            for one, credit in zip(streams, granted, strict=True)
        ]
    return granted


def test_no_stream_loses_credit_while_no_other_lacks_it() -> None:
    idle, busy = CreditState(0, 6, 6, backlogged=False), CreditState(2, 3, 3, backlogged=False)

    assert share(10, [idle, busy]) == [6, 3]


def test_withdrawn_credit_is_granted_to_another_stream_only_after_the_acknowledgement() -> None:
    backlogged = CreditState(2, 2, 2, backlogged=True)

    assert share(10, [CreditState(0, 8, 8, backlogged=False), backlogged]) == [1, 2]
    assert share(10, [CreditState(0, 1, 8, backlogged=False), backlogged]) == [1, 2], "not acknowledged yet"
    assert share(10, [CreditState(0, 1, 1, backlogged=False), backlogged]) == [1, 9]


def test_a_stream_above_its_part_loses_the_excess_as_its_sequences_end() -> None:
    assert share(10, [CreditState(10, 10, 10, backlogged=True), CreditState(0, 0, 0, backlogged=True)]) == [
        5,
        0,
    ]
    assert share(10, [CreditState(7, 5, 7, backlogged=True), CreditState(0, 0, 0, backlogged=True)]) == [5, 3]


def test_a_silent_batcher_reserves_only_what_it_has() -> None:
    stream = BatcherStream(1, acks_credit=True, last_received=100.0)
    stream.grant(8)
    stream.in_flight[0] = object.__new__(InFlightSequence)

    assert stream.credit_state(100.0 + SILENT_SECONDS / 2).committed == 8
    assert stream.credit_state(100.0 + SILENT_SECONDS).committed == 1


def test_without_acknowledgements_a_batcher_is_held_to_its_largest_grant() -> None:
    stream = BatcherStream(1, last_received=100.0)
    stream.grant(8)
    stream.grant(2)

    assert stream.credit_state(100.0).committed == 2
    assert stream.credit_limit == 8, "it may have sent sequences before it received the second grant"


def test_withdrawn_credit_may_be_used_until_the_batcher_acknowledges() -> None:
    stream = BatcherStream(1, acks_credit=True, last_received=100.0)
    stream.grant(8)
    stream.grant(2)
    assert stream.credit_limit == 8

    stream.acknowledge_credit(2)
    assert stream.credit_limit == 2


class Batcher:
    """Sends as much as it may, over a stream with latency."""

    def __init__(self, number: int) -> None:
        self.stream = BatcherStream(number, acks_credit=True, last_received=0.0)
        self.credit = wire.Credit()
        self.outstanding = 0
        self.wants = 0
        self.down: deque[wire.Credit] = deque()
        self.up: deque[int] = deque()  # 0: a sequence; else the generation of credit that was received

    def send(self) -> None:
        while self.wants and self.outstanding < self.credit.sequences:
            self.wants -= 1
            self.outstanding += 1
            self.up.append(0)

    def receive(self) -> None:
        self.credit = self.down.popleft()
        self.up.append(self.credit.generation)


@settings(max_examples=30)
@given(
    dice=st.randoms(use_true_random=False),
    room=st.integers(1, 12),
    count=st.integers(1, 4),
)
def test_batchers_together_never_exceed_the_capacity_and_all_are_served(
    dice: random.Random, room: int, count: int
) -> None:
    batchers = [Batcher(number) for number in range(count)]
    asked, served, now = [0] * count, [0] * count, 0.0
    handles = 0

    def shared() -> None:
        granted = share(room, [one.stream.credit_state(now) for one in batchers])
        for one, credit in zip(batchers, granted, strict=True):
            one.stream.grant(credit)
            one.down.extend(message.credit for message in one.stream.others)
            one.stream.others.clear()

    def act(number: int, what: str) -> None:
        nonlocal handles
        one = batchers[number]
        if what == "ask":
            asked[number] += (burst := dice.randint(1, 8))
            one.wants += burst
            one.send()
        elif what == "receive" and one.down:
            one.receive()
            one.send()
        elif what == "arrive" and one.up:
            one.stream.last_received = now
            if generation := one.up.popleft():
                one.stream.acknowledge_credit(generation)
            else:
                handles += 1
                one.stream.last_submitted = now
                one.stream.in_flight[handles] = InFlightSequence(
                    object.__new__(SequenceSpec), "", 0, none, none, 0
                )
            shared()
        elif what == "end" and one.stream.in_flight:
            for handle in list(one.stream.in_flight)[: dice.randint(1, 4)]:
                del one.stream.in_flight[handle]
                served[number] += 1
                one.outstanding -= 1
            shared()
            one.send()

    none: Any = None
    shared()
    for _ in range(200):
        now += 0.01
        act(dice.randrange(count), dice.choice(["ask", "receive", "arrive", "arrive", "end"]))
        here = sum(len(one.stream.in_flight) for one in batchers)
        in_transit = sum(one.up.count(0) for one in batchers)
        assert here + in_transit <= max(room, count) + IDLE_CREDIT * count, (
            "idle ones may exceed it by one each"
        )
    for _ in range(1000):  # no new requests: all of them are served
        if served == asked:
            break
        now += 0.01
        for number in range(count):
            for what in ("receive", "arrive", "arrive", "end"):
                act(number, what)
    assert served == asked
