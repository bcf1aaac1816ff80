"""The loop keeps a device busy: it launches the next step before it waits for the last one."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import pytest

from headrace.worker.engine.interface import EngineBroken, Result, Row
from headrace.worker.runner import FinishReason
from tests.worker.engine.plan.device import DeviceEngine, DeviceStep, HashEngine
from tests.worker.engine.plan.test_loop import SECONDS, running, sequence


class GatedDevice(DeviceEngine):
    """A device whose results arrive only when the test permits it. It records the order of all calls."""

    def __init__(self) -> None:
        super().__init__(HashEngine(max_running=4))
        self.calls: queue.Queue[tuple[str, int]] = queue.Queue()
        self.permits: queue.Queue[None] = queue.Queue()

    def launch(self, rows: Sequence[Row]) -> DeviceStep:
        step = super().launch(rows)
        self.calls.put(("launch", step.number))
        return step

    def compute(self, step: DeviceStep) -> list[Result]:
        self.calls.put(("wait", step.number))
        self.permits.get(timeout=SECONDS)
        return super().compute(step)


def test_the_next_step_is_launched_before_the_results_of_a_device_are_awaited() -> None:
    engine = GatedDevice()
    with running(engine) as (loop, reports):
        loop.submit(sequence(1, tokens=4))
        calls = [engine.calls.get(timeout=SECONDS) for _ in range(3)]
        assert calls == [("launch", 0), ("launch", 1), ("wait", 0)]
        assert reports.empty()
        engine.permits.put(None)
        assert [engine.calls.get(timeout=SECONDS) for _ in range(2)] == [("launch", 2), ("wait", 1)]

        first = reports.get(timeout=SECONDS)  # while the next results are awaited
        assert (first.rows, first.tokens, len(first.updates)) == (1, 3, 1)
        for _ in range(3):
            engine.permits.put(None)
        later = [reports.get(timeout=SECONDS) for _ in range(3)]
        assert later[-1].updates[0].finish is FinishReason.LENGTH
        assert [report.dropped for report in later] == [0, 0, 0]
        assert sum(report.decodes for report in later) == 3


def test_a_sequence_cancelled_while_two_steps_are_in_flight_is_not_in_the_next() -> None:
    engine = GatedDevice()
    with running(engine) as (loop, reports):
        loop.submit(sequence(1))
        for _ in range(3):
            engine.calls.get(timeout=SECONDS)
        loop.cancel(1)
        engine.permits.put(None)
        assert engine.calls.get(timeout=SECONDS) == ("wait", 1), "nothing is launched"
        assert len(reports.get(timeout=SECONDS).updates[0].token_ids) == 1
        assert reports.get(timeout=SECONDS).updates[0].finish is FinishReason.CANCELLED
        engine.permits.put(None)

        last = reports.get(timeout=SECONDS)
        assert (last.rows, last.dropped, last.updates) == (1, 1, [])
        assert last.kv_tokens_free == engine.model.kv_tokens


def test_stopping_awaits_the_steps_in_flight() -> None:
    engine = DeviceEngine(HashEngine())
    with running(engine) as (loop, reports):
        loop.submit(sequence(1, tokens=4000))
        reports.get(timeout=SECONDS)
    endings = []
    while not reports.empty():
        last = reports.get()
        endings += [update.finish for update in last.updates if update.finish]

    assert endings == [FinishReason.CANCELLED]
    assert last.kv_tokens_free == engine.model.kv_tokens


class Unlaunchable(DeviceEngine):
    """A device whose second launch fails."""

    def launch(self, rows: Sequence[Row]) -> DeviceStep:
        if self.launched == 1:
            self.launched += 1
            raise RuntimeError("no memory")
        return super().launch(rows)


@pytest.mark.parametrize(
    "engine",
    [DeviceEngine(HashEngine(block_tokens=2), failing=frozenset({1})), Unlaunchable(HashEngine())],
    ids=["step", "launch"],
)
def test_a_failed_step_of_a_device_ends_its_sequences_and_later_ones_are_computed(
    engine: DeviceEngine,
) -> None:
    with running(engine) as (loop, reports):
        endings = []
        for _ in range(2):
            loop.submit(sequence(1, 7, tokens=3))
            count, finish = 0, None
            while finish is None:
                for update in reports.get(timeout=SECONDS).updates:
                    assert update.offset == count
                    count += len(update.token_ids)
                    finish = update.finish
            endings.append((finish, count))

    assert endings == [(FinishReason.FAULT, 1), (FinishReason.LENGTH, 3)]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_broken_device_ends_the_process_with_one_line(
    ahead: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(DeviceEngine):
        def compute(self, step: DeviceStep) -> list[Result]:
            raise EngineBroken("illegal memory access")

    exits: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr("os._exit", exits.put)
    with running(Broken(HashEngine(), ahead=ahead)) as (loop, reports):
        loop.submit(sequence(1))
        assert exits.get(timeout=SECONDS) == 1

    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("ERROR", None)]
    assert caplog.records[0].__dict__["reason"] == "illegal memory access"
    assert reports.empty()
