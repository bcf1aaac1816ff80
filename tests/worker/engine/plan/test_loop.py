"""The engine's thread: sequences end before the next step, and each step is reported in time."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.deadline import NEVER, Deadline
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import DeferredStep, Engine, Result, Row
from headrace.worker.engine.plan import loop as loop_module
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec, StepReport
from tests.worker.engine.plan.device import DeviceEngine

SECONDS = 90  # longer than a step takes on any machine


class GatedEngine(EchoEngine):
    """Computes a step only when the test permits it, and shows which rows are in it."""

    def __init__(self) -> None:
        super().__init__(max_running=4)
        self.entered: queue.Queue[set[int]] = queue.Queue()
        self.permits: queue.Queue[None] = queue.Queue()

    def step(self, rows: Sequence[Row]) -> list[Result]:
        self.entered.put({row.ids[0] for row in rows})
        self.permits.get(timeout=SECONDS)
        return super().step(rows)


def sequence(key: int, length: int = 3, *, deadline: Deadline = NEVER, tokens: int = 50) -> SequenceSpec[int]:
    params = SamplingParams(seed=0, max_tokens=tokens, ignore_eos=True)
    return SequenceSpec(key, [key] * length, length, params, deadline, time.monotonic())


@contextmanager
def running(
    engine: Engine, *, step_tokens: int = 512
) -> Iterator[tuple[EngineLoop[int], queue.Queue[StepReport[int]]]]:
    reports: queue.Queue[StepReport[int]] = queue.Queue()
    loop: EngineLoop[int] = EngineLoop(engine, step_tokens=step_tokens)
    loop.start(reports.put)
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
        assert list(reports.get(timeout=SECONDS).updates[0].token_ids) == [1]
        (update,) = reports.get(timeout=SECONDS).updates
        assert (update.key, update.finish) == (1, FinishReason.CANCELLED)
        for _ in range(60):
            engine.permits.put(None)


def test_a_sequence_whose_deadline_passes_during_a_step_is_not_in_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = GatedEngine()
    with running(engine) as (loop, reports):
        loop.submit(sequence(1, deadline=Deadline.after(3600, time.monotonic())))
        engine.entered.get(timeout=SECONDS)
        # The deadline passes in this step, however busy the machine is.
        late = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600, time_ns=time.time_ns)
        monkeypatch.setattr(loop_module, "time", late)
        engine.permits.put(None)

        reports.get(timeout=SECONDS)
        last = reports.get(timeout=SECONDS)
        (update,) = last.updates
        assert update.finish is FinishReason.DEADLINE
        assert engine.entered.empty()
        assert last.kv_tokens_free == engine.model.kv_tokens


def test_a_sequence_cancelled_during_prefill_or_while_it_waits_ends_too() -> None:
    engine = GatedEngine()
    with running(engine, step_tokens=8) as (loop, reports):
        for key in range(6):  # 4 slots: two wait, and prefill takes many steps
            loop.submit(sequence(key, 100))
        engine.entered.get(timeout=SECONDS)
        for key in range(6):
            loop.cancel(key)
        engine.permits.put(None)

        endings: dict[int, FinishReason | None] = {}
        while len(endings) < 6:
            for update in reports.get(timeout=SECONDS).updates:
                endings[update.key] = update.finish
        assert set(endings.values()) == {FinishReason.CANCELLED}
        assert engine.entered.empty(), "there was nothing left to compute"


def test_sequences_that_are_submitted_together_are_in_the_same_step() -> None:
    engine = GatedEngine()
    with running(engine) as (loop, _):
        loop.submit(*(sequence(key) for key in range(1, 5)))
        assert engine.entered.get(timeout=SECONDS) == {1, 2, 3, 4}
        for _ in range(60):
            engine.permits.put(None)


def test_a_cancel_that_comes_too_late_does_not_end_the_next_sequence_of_the_same_key() -> None:
    """Keys are reused as soon as a sequence has ended, and a cancel may still be on its way."""
    engine = GatedEngine()
    with running(engine) as (loop, reports):
        loop.submit(sequence(1, tokens=1))
        loop.submit(sequence(2, tokens=9))
        engine.entered.get(timeout=SECONDS)
        engine.permits.put(None)
        if engine.entered.get(timeout=SECONDS) == {1, 2}:  # 2 may have arrived in time for the first step
            engine.permits.put(None)
            assert engine.entered.get(timeout=SECONDS) == {2}
        loop.cancel(1)  # its last token is reported already
        loop.submit(sequence(1, tokens=2))
        for _ in range(20):
            engine.permits.put(None)

        endings: list[tuple[int, FinishReason]] = []
        while len(endings) < 3:
            updates = reports.get(timeout=SECONDS).updates
            endings += [(update.key, update.finish) for update in updates if update.finish]
        assert sorted(endings, key=lambda end: end[0]) == [
            (1, FinishReason.LENGTH),
            (1, FinishReason.LENGTH),
            (2, FinishReason.LENGTH),
        ]


def test_stopping_reports_the_end_of_every_sequence() -> None:
    engine = EchoEngine(step_seconds=0.001)
    with running(engine) as (loop, reports):
        for key in range(5):
            loop.submit(sequence(key, tokens=10_000))
    ended = set()
    while not reports.empty():
        last = reports.get()
        ended |= {update.key for update in last.updates if update.finish}

    assert ended == set(range(5))
    assert last.kv_tokens_free == engine.model.kv_tokens


def test_stopping_does_not_wait_forever_for_a_step_that_hangs() -> None:
    engine = GatedEngine()
    with running(engine) as (loop, reports):
        loop.submit(sequence(1))
        engine.entered.get(timeout=SECONDS)
        loop.stop(seconds=0.05)
        assert reports.empty()
        for _ in range(2):
            engine.permits.put(None)


def test_a_step_is_reported_before_the_thread_computes_the_next() -> None:
    engine = GatedEngine()
    with running(engine) as (loop, reports):
        loop.submit(sequence(1, tokens=2))
        engine.entered.get(timeout=SECONDS)
        assert reports.empty()
        engine.permits.put(None)
        engine.entered.get(timeout=SECONDS)

        first = reports.get(timeout=SECONDS)  # the second step is still being computed
        assert [list(update.token_ids) for update in first.updates] == [[1]]
        engine.permits.put(None)

        last = reports.get(timeout=SECONDS)  # immediately, because no step follows
        assert last.updates[0].finish is FinishReason.LENGTH


class FailingEngine(EchoEngine):
    """Fails in its second step.

    at_launch   whether the launch raises, or the step
    """

    def __init__(self, *, at_launch: bool) -> None:
        super().__init__(block_tokens=2)
        self.at_launch = at_launch
        self.steps = 0

    def launch(self, rows: Sequence[Row]) -> DeferredStep:
        self.steps += 1
        if self.steps == 2 and self.at_launch:
            raise RuntimeError("no memory")
        return super().launch(rows)

    def step(self, rows: Sequence[Row]) -> list[Result]:
        if self.steps == 2:
            raise RuntimeError("no memory")
        return super().step(rows)


@pytest.mark.parametrize("at_launch", [False, True])
def test_a_step_that_raises_loses_no_report_and_caches_nothing(at_launch: bool) -> None:
    engine = FailingEngine(at_launch=at_launch)
    ended: list[tuple[FinishReason, list[int], int]] = []
    with running(engine) as (loop, reports):
        for _ in range(2):  # equal prompts: the second would share what the first computed
            loop.submit(sequence(1, 7, tokens=3))
            finish = None
            tokens: list[int] = []
            while finish is None:
                report = reports.get(timeout=SECONDS)
                for update in report.updates:
                    assert update.offset == len(tokens)
                    tokens += update.token_ids
                    finish = update.finish
            ended.append((finish, tokens, report.cached_tokens))
            assert report.kv_tokens_free == engine.model.kv_tokens

    assert ended == [(FinishReason.FAULT, [1], 0), (FinishReason.LENGTH, [1, 1, 1], 0)]


@given(
    ahead=st.booleans(),
    plan=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.booleans()), min_size=1, max_size=10),
)
@settings(max_examples=30, deadline=None)
def test_random_arrivals_and_cancels_from_another_thread_end_exactly_once(
    ahead: bool,
    plan: list[tuple[int, int, bool]],
) -> None:
    echo = EchoEngine(max_running=3, context_length=64, block_tokens=4, kv_blocks=18)
    engine = DeviceEngine(echo) if ahead else echo
    answers: dict[int, list[int]] = {key: [] for key in range(len(plan))}
    endings: dict[int, FinishReason] = {}
    with running(engine, step_tokens=7) as (loop, reports):
        for key, (length, tokens, cancelled) in enumerate(plan):
            loop.submit(sequence(key, length, tokens=tokens))
            if cancelled:
                loop.cancel(key)
        while len(endings) < len(plan):
            last = reports.get(timeout=SECONDS)
            for update in last.updates:
                key = update.key
                assert key not in endings
                assert update.offset == len(answers[key])
                answers[key] += update.token_ids
                if update.finish is not None:
                    endings[key] = update.finish

    for key, (_, tokens, cancelled) in enumerate(plan):
        assert endings[key] is FinishReason.LENGTH or cancelled
        assert answers[key] == [key] * len(answers[key])
        assert len(answers[key]) == tokens or endings[key] is FinishReason.CANCELLED
    assert last.kv_tokens_free == engine.model.kv_tokens


def test_a_sequence_that_cannot_be_scheduled_ends_alone_and_the_engine_continues() -> None:
    reports: queue.Queue[StepReport[int]] = queue.Queue()
    loop: EngineLoop[int] = EngineLoop(EchoEngine())
    loop.start(reports.put)
    params = SamplingParams(seed=1, max_tokens=4)
    for key, ids in enumerate(([-1], [2**40], [258], [], [65] * 5000, [65, 66])):
        loop.submit(SequenceSpec(key, ids, len(ids), params))
    endings: dict[int, FinishReason] = {}
    while len(endings) < 6:
        for update in reports.get(timeout=60).updates:
            if update.finish is not None:
                endings[update.key] = update.finish
    loop.stop()

    assert endings == {**dict.fromkeys(range(5), FinishReason.FAULT), 5: FinishReason.STOP}
