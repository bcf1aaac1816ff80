"""The engine's thread: who leaves does so before the next step, and everybody hears of each step in time."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import Fault, Row, SamplingParams, Token, nothing
from headrace.worker.engine.plan.loop import EngineLoop, StepReport
from headrace.worker.engine.plan.scheduler import Ending, LiveSequence

SECONDS = 90  # longer than a step ever takes, on whatever machine


class GatedEngine(EchoEngine):
    """Computes a step only when the test allows it, and shows whose rows are in it.

    alone   whether it is a device that computes by itself: it calls meanwhile after the launch, else before
    """

    def __init__(self, *, alone: bool = False) -> None:
        super().__init__(max_running=4)
        self.alone = alone
        self.entered: queue.Queue[set[int]] = queue.Queue()
        self.permits: queue.Queue[None] = queue.Queue()

    def step(
        self, rows: Sequence[Row], meanwhile: Callable[[], None] = nothing
    ) -> list[Token | Fault | None]:
        if not self.alone:
            meanwhile()
        self.entered.put({row.ids[0] for row in rows})
        if self.alone:
            meanwhile()
        self.permits.get(timeout=SECONDS)
        return super().step(rows)


def sequence(
    key: int, length: int = 3, *, expires: float | None = None, tokens: int = 50
) -> LiveSequence[int]:
    params = SamplingParams(seed=0, max_tokens=tokens, ignore_eos=True)
    return LiveSequence(key, [key] * length, length, params, expires, time.monotonic())


@contextmanager
def running(
    engine: EchoEngine, *, step_tokens: int = 512
) -> Iterator[tuple[EngineLoop[int], queue.Queue[StepReport[int]]]]:
    reports: queue.Queue[StepReport[int]] = queue.Queue()
    loop: EngineLoop[int] = EngineLoop(engine, report=reports.put, step_tokens=step_tokens)
    loop.start()
    try:
        yield loop, reports
    finally:
        loop.stop()


def test_a_sequence_cancelled_during_a_step_is_not_in_the_next() -> None:
    engine = GatedEngine()
    with running(engine) as (loop, reports):
        loop.submit(sequence(1))
        assert engine.entered.get(timeout=SECONDS) == {1}
        loop.submit(sequence(2))
        loop.cancel(1)
        engine.permits.put(None)

        assert engine.entered.get(timeout=SECONDS) == {2}
        assert reports.get(timeout=SECONDS).updates[0].token_ids == [1]
        (goodbye,) = reports.get(timeout=SECONDS).updates
        assert (goodbye.sequence.key, goodbye.ending) == (1, Ending.CANCELLED)
        for _ in range(60):
            engine.permits.put(None)


def test_a_sequence_whose_deadline_passes_during_a_step_is_not_in_the_next() -> None:
    engine = GatedEngine()
    with running(engine) as (loop, reports):
        hurried = sequence(1, expires=time.monotonic() + 3600)
        loop.submit(hurried)
        engine.entered.get(timeout=SECONDS)
        hurried.expires = time.monotonic()  # so that it passes in this step, however busy the machine is
        engine.permits.put(None)

        reports.get(timeout=SECONDS)
        last = reports.get(timeout=SECONDS)
        (goodbye,) = last.updates
        assert goodbye.ending is Ending.DEADLINE
        assert engine.entered.empty()
        assert last.kv_tokens_free == engine.model.kv_tokens


def test_a_sequence_cancelled_in_mid_prefill_or_while_it_waits_leaves_too() -> None:
    engine = GatedEngine()
    with running(engine, step_tokens=8) as (loop, reports):
        for key in range(6):  # 4 places: two wait, and prefill takes many steps
            loop.submit(sequence(key, 100))
        engine.entered.get(timeout=SECONDS)
        for key in range(6):
            loop.cancel(key)
        engine.permits.put(None)

        endings: dict[int, Ending | None] = {}
        while len(endings) < 6:
            for update in reports.get(timeout=SECONDS).updates:
                endings[update.sequence.key] = update.ending
        assert set(endings.values()) == {Ending.CANCELLED}
        assert engine.entered.empty(), "there was nothing left to compute"


def test_a_cancel_that_comes_too_late_does_not_hit_the_next_of_the_same_key() -> None:
    """Keys are reused as soon as a sequence has ended, and its cancel may be under way then."""
    engine = GatedEngine()
    with running(engine) as (loop, reports):
        loop.submit(sequence(1, tokens=1))
        loop.submit(sequence(2, tokens=9))
        engine.entered.get(timeout=SECONDS)
        engine.permits.put(None)
        if engine.entered.get(timeout=SECONDS) == {1, 2}:  # 2 may have come in time for the first step
            engine.permits.put(None)
            assert engine.entered.get(timeout=SECONDS) == {2}
        loop.cancel(1)  # whose last token is out already
        loop.submit(sequence(1, tokens=2))
        for _ in range(20):
            engine.permits.put(None)

        endings: list[tuple[int, Ending]] = []
        while len(endings) < 3:
            updates = reports.get(timeout=SECONDS).updates
            endings += [(update.sequence.key, update.ending) for update in updates if update.ending]
        assert sorted(endings, key=lambda end: end[0]) == [
            (1, Ending.LENGTH),
            (1, Ending.LENGTH),
            (2, Ending.LENGTH),
        ]


def test_stopping_tells_every_sequence_that_it_ended() -> None:
    engine = EchoEngine(step_seconds=0.001)
    with running(engine) as (loop, reports):
        for key in range(5):
            loop.submit(sequence(key, tokens=10_000))
    ended = set()
    while not reports.empty():
        last = reports.get()
        ended |= {update.sequence.key for update in last.updates if update.ending}

    assert ended == set(range(5))
    assert last.kv_tokens_free == engine.model.kv_tokens


def test_stopping_does_not_wait_for_ever_for_a_step_that_does_not_end() -> None:
    engine = GatedEngine()
    with running(engine) as (loop, reports):
        loop.submit(sequence(1))
        engine.entered.get(timeout=SECONDS)
        loop.stop(seconds=0.05)
        assert reports.empty()
        for _ in range(2):
            engine.permits.put(None)


def test_a_step_is_told_while_a_device_computes_the_next_or_before_a_thread_does() -> None:
    for alone in (True, False):
        engine = GatedEngine(alone=alone)
        with running(engine) as (loop, reports):
            loop.submit(sequence(1, tokens=2))
            engine.entered.get(timeout=SECONDS)
            assert reports.empty()
            engine.permits.put(None)
            engine.entered.get(timeout=SECONDS)

            first = reports.get(timeout=SECONDS)  # the second step is still being computed
            assert [update.token_ids for update in first.updates] == [[1]]
            engine.permits.put(None)

            last = reports.get(timeout=SECONDS)  # at once, for no step follows
            assert last.updates[0].ending is Ending.LENGTH


class Careless(EchoEngine):
    """Raises in its second step before it has called meanwhile."""

    steps = 0

    def step(
        self, rows: Sequence[Row], meanwhile: Callable[[], None] = nothing
    ) -> list[Token | Fault | None]:
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("no memory")
        return super().step(rows, meanwhile)


def test_a_step_that_raises_loses_no_report_and_leaves_nothing_to_build_on() -> None:
    engine = Careless(block_tokens=2)
    ended: list[tuple[Ending, list[int], int]] = []
    with running(engine) as (loop, reports):
        for _ in range(2):  # alike: the second would share what the first computed
            loop.submit(sequence(1, 7, tokens=3))
            ending = None
            tokens: list[int] = []
            while ending is None:
                report = reports.get(timeout=SECONDS)
                for update in report.updates:
                    assert update.offset == len(tokens)
                    tokens += update.token_ids
                    ending = update.ending
            ended.append((ending, tokens, report.cached_tokens))
            assert report.kv_tokens_free == engine.model.kv_tokens

    assert ended == [(Ending.FAULT, [1], 0), (Ending.LENGTH, [1, 1, 1], 0)]


@given(
    plan=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.booleans()), min_size=1, max_size=10)
)
@settings(max_examples=30, deadline=None)
def test_random_arrivals_and_cancels_from_another_thread_end_exactly_once(
    plan: list[tuple[int, int, bool]],
) -> None:
    engine = EchoEngine(max_running=3, context_length=64, block_tokens=4, kv_blocks=18)
    said: dict[int, list[int]] = {key: [] for key in range(len(plan))}
    endings: dict[int, Ending] = {}
    with running(engine, step_tokens=7) as (loop, reports):
        for key, (length, tokens, leaves) in enumerate(plan):
            loop.submit(sequence(key, length, tokens=tokens))
            if leaves:
                loop.cancel(key)
        while len(endings) < len(plan):
            last = reports.get(timeout=SECONDS)
            for update in last.updates:
                key = update.sequence.key
                assert key not in endings
                assert update.offset == len(said[key])
                said[key] += update.token_ids
                if update.ending is not None:
                    endings[key] = update.ending

    for key, (_, tokens, leaves) in enumerate(plan):
        assert endings[key] is Ending.LENGTH or leaves
        assert said[key] == [key] * len(said[key])
        assert len(said[key]) == tokens or endings[key] is Ending.CANCELLED
    assert last.kv_tokens_free == engine.model.kv_tokens


def test_a_sequence_that_cannot_be_scheduled_ends_by_itself_and_the_engine_goes_on() -> None:
    reports: queue.Queue[StepReport[int]] = queue.Queue()
    loop = EngineLoop(EchoEngine(), report=reports.put)
    loop.start()
    params = SamplingParams(seed=1, max_tokens=4)
    for key, ids in enumerate(([-1], [2**40], [258], [], [65] * 5000, [65, 66])):
        loop.submit(LiveSequence(key, list(ids), len(ids), params, None, 0.0))
    endings: dict[int, Ending] = {}
    while len(endings) < 6:
        for update in reports.get(timeout=60).updates:
            if update.ending is not None:
                endings[update.sequence.key] = update.ending
    loop.stop()

    assert endings == {**dict.fromkeys(range(5), Ending.FAULT), 5: Ending.STOP}
