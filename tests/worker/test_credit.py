"""Several batchers share a worker: what may wait there stays short, and nobody is shut out."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.credit import KNOCK, Standing, capacity, fill, share
from headrace.worker.engine.plan.scheduler import LiveSequence
from headrace.worker.stream import SILENT_SECONDS, Flight, Session


def standings(draw: st.DrawFn) -> Standing:
    held, credit, more = draw(st.integers(0, 40)), draw(st.integers(0, 40)), draw(st.integers(0, 10))
    return Standing(held, credit, max(held, credit) + more, draw(st.booleans()) or held >= credit)


STREAMS = st.lists(st.composite(standings)(), min_size=1, max_size=8)


@given(
    max_running=st.integers(1, 256),
    running=st.integers(0, 256),
    waiting=st.integers(0, 256),
    step_tokens=st.integers(1, 4096),
    mean_prompt=st.floats(0, 10_000),
)
def test_what_may_wait_is_about_one_steps_prompts(
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
def test_nothing_is_promised_that_is_not_free(room: int, streams: list[Standing]) -> None:
    told = share(room, streams)

    before = sum(one.committed for one in streams)
    after = sum(max(one.committed, credit) for one, credit in zip(streams, told, strict=True))
    assert after <= max(room, len(streams), before)


@given(room=st.integers(8, 100), streams=st.integers(2, 8))
def test_whoever_is_idle_can_begin_and_the_hungry_share_evenly(room: int, streams: int) -> None:
    idle = Standing(held=0, credit=0, committed=0, hungry=False)
    told = settle(room, [idle, *[Standing(0, 0, 0, hungry=True)] * (streams - 1)])

    assert max(told[1:]) - min(told[1:]) <= 1
    assert room - room // 4 <= sum(told) <= room, "but for its reserve"


@given(room=st.integers(1, 100), streams=st.integers(1, 64), working=st.integers(1, 4))
def test_streams_that_do_nothing_keep_nothing_from_those_that_work(
    room: int, streams: int, working: int
) -> None:
    idle = Standing(held=0, credit=0, committed=0, hungry=False, idle=True)
    told = settle(room, [*[idle] * streams, *[Standing(0, 0, 0, hungry=True)] * working])

    assert sum(told[streams:]) == max(room, working)
    assert told[:streams] == [KNOCK] * streams, "each can show that it is not idle"


def test_an_idle_stream_gives_up_what_it_was_told_as_soon_as_somebody_lacks_it() -> None:
    idle = Standing(held=0, credit=6, committed=6, hungry=False, idle=True)

    assert share(8, [idle, Standing(2, 2, 2, hungry=False)]) == [6, 2]
    assert share(8, [idle, Standing(2, 2, 2, hungry=True)]) == [KNOCK, 3]


def test_while_nobody_is_hungry_the_idle_share_a_quarter_to_begin_with() -> None:
    new = Standing(held=0, credit=0, committed=0, hungry=False, idle=True)
    full = Standing(held=2, credit=32, committed=32, hungry=False)

    assert share(32, [full, new]) == [10, KNOCK], "taken back, and not acknowledged yet"
    assert share(32, [Standing(2, 10, 10, hungry=False), new]) == [10, 8]
    assert share(32, [Standing(2, 10, 10, hungry=False), new, new]) == [10, 4, 4]


@given(room=st.integers(1, 60), streams=STREAMS)
def test_who_has_least_is_given_more_first(room: int, streams: list[Standing]) -> None:
    """One at a time to whoever has least of those that lack some, as long as there is any."""
    told, due = [one.held for one in streams], [one.held + one.credit for one in streams]
    expected = list(told)
    for _ in range(min(room, sum(due) - sum(told))):
        lacking = [number for number, most in enumerate(due) if expected[number] < most]
        poorest = min(lacking, key=expected.__getitem__)
        expected[poorest] += 1

    assert fill(told, due, min(room, sum(due) - sum(told))) == expected


def test_a_large_capacity_is_shared_without_counting_up_to_it() -> None:
    hungry = Standing(0, 0, 0, hungry=True)

    assert share(10**12, [hungry] * 3) == [(10**12 + 2) // 3, 10**12 // 3, 10**12 // 3]


def settle(room: int, streams: list[Standing]) -> list[int]:
    """What they are told in the end, if all use what they have and acknowledge what they lose."""
    for _ in range(10):
        told = share(room, streams)
        streams = [
            Standing(credit if one.hungry else one.held, credit, credit, one.hungry, one.idle)
            for one, credit in zip(streams, told, strict=True)
        ]
    return told


def test_nobody_loses_credit_while_nobody_lacks_it() -> None:
    idle, busy = Standing(0, 6, 6, hungry=False), Standing(2, 3, 3, hungry=False)

    assert share(10, [idle, busy]) == [6, 3]


def test_what_one_may_still_use_is_not_given_to_another_until_it_is_given_up() -> None:
    hungry = Standing(2, 2, 2, hungry=True)

    assert share(10, [Standing(0, 8, 8, hungry=False), hungry]) == [1, 2]
    assert share(10, [Standing(0, 1, 8, hungry=False), hungry]) == [1, 2], "told, and not acknowledged"
    assert share(10, [Standing(0, 1, 1, hungry=False), hungry]) == [1, 9]


def test_who_has_more_than_its_part_gives_it_up_as_its_sequences_end() -> None:
    assert share(10, [Standing(10, 10, 10, hungry=True), Standing(0, 0, 0, hungry=True)]) == [5, 0]
    assert share(10, [Standing(7, 5, 7, hungry=True), Standing(0, 0, 0, hungry=True)]) == [5, 3]


def test_a_batcher_that_is_silent_holds_back_only_what_it_has() -> None:
    session = Session(1, acks_credit=True, heard=100.0)
    session.grant(8)
    session.flights[0] = object.__new__(Flight)

    assert session.stands(100.0 + SILENT_SECONDS / 2).committed == 8
    assert session.stands(100.0 + SILENT_SECONDS).committed == 1


def test_a_batcher_that_does_not_acknowledge_credit_is_taken_at_its_last_word() -> None:
    session = Session(1, heard=100.0)
    session.grant(8)
    session.grant(2)

    assert session.stands(100.0).committed == 2
    assert session.allowance == 8, "what it sent before it heard is not held against it"


def test_credit_that_was_taken_back_may_be_used_until_the_batcher_knows() -> None:
    session = Session(1, acks_credit=True, heard=100.0)
    session.grant(8)
    session.grant(2)
    assert session.allowance == 8

    session.saw_credit(2)
    assert session.allowance == 2


class Batcher:
    """One that sends all that it may, over a stream on which everything takes its time."""

    def __init__(self, number: int) -> None:
        self.session = Session(number, acks_credit=True, heard=0.0)
        self.credit = wire.Credit()
        self.outstanding = 0
        self.wants = 0
        self.down: deque[wire.Credit] = deque()
        self.up: deque[int] = deque()  # 0: a sequence; else the generation of credit that was seen

    def send(self) -> None:
        while self.wants and self.outstanding < self.credit.sequences:
            self.wants -= 1
            self.outstanding += 1
            self.up.append(0)

    def hear(self) -> None:
        self.credit = self.down.popleft()
        self.up.append(self.credit.generation)


@settings(max_examples=30)
@given(
    dice=st.randoms(use_true_random=False),
    room=st.integers(1, 12),
    count=st.integers(1, 4),
)
def test_all_batchers_together_never_have_more_here_than_there_is_room_for_and_all_get_served(
    dice: random.Random, room: int, count: int
) -> None:
    batchers = [Batcher(number) for number in range(count)]
    asked, served, now = [0] * count, [0] * count, 0.0
    handles = 0

    def shared() -> None:
        told = share(room, [one.session.stands(now) for one in batchers])
        for one, credit in zip(batchers, told, strict=True):
            one.session.grant(credit)
            one.down.extend(message.credit for message in one.session.others)
            one.session.others.clear()

    def act(number: int, what: str) -> None:
        nonlocal handles
        one = batchers[number]
        if what == "ask":
            asked[number] += (burst := dice.randint(1, 8))
            one.wants += burst
            one.send()
        elif what == "hear" and one.down:
            one.hear()
            one.send()
        elif what == "arrive" and one.up:
            one.session.heard = now
            if generation := one.up.popleft():
                one.session.saw_credit(generation)
            else:
                handles += 1
                one.session.submitted = now
                one.session.flights[handles] = Flight(object.__new__(LiveSequence), "", 0, none, none, 0)
            shared()
        elif what == "end" and one.session.flights:
            for handle in list(one.session.flights)[: dice.randint(1, 4)]:
                del one.session.flights[handle]
                served[number] += 1
                one.outstanding -= 1
            shared()
            one.send()

    none: Any = None
    shared()
    for _ in range(200):
        now += 0.01
        act(dice.randrange(count), dice.choice(["ask", "hear", "arrive", "arrive", "end"]))
        here = sum(len(one.session.flights) for one in batchers)
        under_way = sum(one.up.count(0) for one in batchers)
        assert here + under_way <= max(room, count) + KNOCK * count, "the idle may knock beyond it"
    for _ in range(1000):  # no more is asked: all of it is served
        if served == asked:
            break
        now += 0.01
        for number in range(count):
            for what in ("hear", "arrive", "arrive", "end"):
                act(number, what)
    assert served == asked
