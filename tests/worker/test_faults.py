"""Faults are injected as planned, whichever runner computes, and only then."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.faults import FaultPlan, FaultyRunner
from headrace.worker.runner import (
    FinishReason,
    ModelInfo,
    Runner,
    SamplingParams,
    SequenceSpec,
    SequenceUpdate,
    StepReport,
)
from tests.harness import collect, prompt, running_worker
from tests.tier import running_tier
from tests.worker.engine.plan.device import DeviceEngine


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("crash=1", "not a fault"),
        ("nan_row=x", "a number"),
        ("nan_row", "a number"),
        ("nan_row=-1", "0 or more"),
    ],
)
def test_an_invalid_plan_is_rejected_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        FaultPlan.parse(text)


def test_a_plan_is_parsed() -> None:
    assert FaultPlan.parse("") == FaultPlan()
    assert FaultPlan.parse("step_delay=0.5, nan_row=3") == FaultPlan(step_delay=0.5, nan_row=3)


class HandRunner:
    """A runner whose reports the test makes.

    keys   of the submitted sequences here, in the order in which they were submitted
    """

    step_tokens = 8
    shared_block_tokens = 0

    def __init__(self) -> None:
        self.model: ModelInfo = EchoEngine().model
        self.keys: list[Any] = []
        self.cancelled: list[Any] = []
        self.stopped = False
        self._report: Callable[[StepReport[Any]], None] = lambda report: None

    def start(self, report: Callable[[StepReport[Any]], None]) -> None:
        self._report = report

    def submit(self, *specs: SequenceSpec[Any]) -> None:
        self.keys += [spec.key for spec in specs]

    def cancel(self, *keys: Any) -> None:
        self.cancelled += keys

    def stop(self) -> None:
        self.stopped = True

    def step(self, *updates: SequenceUpdate[int]) -> None:
        """Report a step. Its updates have indices of `keys` as keys."""
        own = [dataclasses.replace(update, key=self.keys[update.key]) for update in updates]
        self._report(StepReport(own, rows=len(own)))


def sequence(key: int, ids: Sequence[int] = (5,)) -> SequenceSpec[int]:
    return SequenceSpec(key, ids, 1, SamplingParams(seed=0, max_tokens=9))


def faulty(plan: FaultPlan, *keys: int) -> tuple[HandRunner, Runner[int], list[SequenceUpdate[int]]]:
    """Return a runner, the same with faults and with sequences of these keys, and the updates that arrive."""
    inner = HandRunner()
    runner: Runner[int] = FaultyRunner(inner, plan)
    updates: list[SequenceUpdate[int]] = []
    runner.start(lambda report: updates.extend(report.updates))
    runner.submit(*map(sequence, keys))
    return inner, runner, updates


def test_without_a_fault_everything_passes() -> None:
    inner, runner, updates = faulty(FaultPlan(nan_row=100), 1, 2)
    runner.cancel(1, 3)
    inner.step(SequenceUpdate(0, 0, [7, 8]), SequenceUpdate(1, 0, [9], finish=FinishReason.STOP))
    runner.stop()

    assert (len(inner.keys), inner.cancelled, inner.stopped) == (2, inner.keys[:1], True)
    assert [(update.key, list(update.token_ids)) for update in updates] == [(1, [7, 8]), (2, [9])]
    assert (runner.model, runner.step_tokens, runner.shared_block_tokens) == (inner.model, 8, 0)


def test_a_bad_row_ends_its_sequence_after_the_tokens_before_it() -> None:
    inner, _, updates = faulty(FaultPlan(nan_row=3), 1, 2)
    inner.step(SequenceUpdate(0, 4, [7, 8, 9, 10]), SequenceUpdate(1, 0, [5]))
    inner.step(SequenceUpdate(0, 8, [11]), SequenceUpdate(0, 9, finish=FinishReason.CANCELLED))

    assert inner.cancelled == inner.keys[:1]
    assert [(update.key, list(update.token_ids), update.finish) for update in updates] == [
        (1, [7, 8], FinishReason.FAULT),
        (2, [5], None),
    ]
    assert "on purpose" in updates[0].fault


def test_a_key_may_be_used_again_before_the_failed_sequence_has_ended_at_the_inner_runner() -> None:
    inner, runner, updates = faulty(FaultPlan(nan_row=1), 1)
    inner.step(SequenceUpdate(0, 0, [7]))
    runner.submit(sequence(1))
    inner.step(SequenceUpdate(0, 1, [8]), SequenceUpdate(0, 2, finish=FinishReason.CANCELLED))
    inner.step(SequenceUpdate(1, 0, [], finish=FinishReason.LENGTH))

    assert len(set(inner.keys)) == 2
    assert [(update.key, update.offset, update.finish) for update in updates] == [
        (1, 0, FinishReason.FAULT),
        (1, 0, FinishReason.LENGTH),
    ]


def test_a_failed_step_ends_all_its_sequences() -> None:
    inner, _, updates = faulty(FaultPlan(raise_step=2), 1, 2)
    inner.step(SequenceUpdate(0, 0, [7]))
    inner.step(SequenceUpdate(0, 1, [8]), SequenceUpdate(1, 0, [5], finish=FinishReason.STOP))

    assert inner.cancelled == inner.keys[:1], "the other one has ended"
    assert [(update.key, list(update.token_ids), update.finish) for update in updates] == [
        (1, [7], None),
        (1, [], FinishReason.FAULT),
        (2, [], FinishReason.FAULT),
    ]


def test_faults_are_injected_into_an_engine_that_runs_ahead() -> None:
    loop: EngineLoop[int] = EngineLoop(DeviceEngine(EchoEngine()))
    runner: Runner[int] = FaultyRunner(loop, FaultPlan(nan_row=3, step_delay=0.001))
    reports: queue.Queue[StepReport[int]] = queue.Queue()
    runner.start(reports.put)
    runner.submit(SequenceSpec(1, [5, 6], 2, SamplingParams(seed=0, max_tokens=9, ignore_eos=True)))
    updates: list[SequenceUpdate[int]] = []
    while not updates or updates[-1].finish is None:
        updates += reports.get(timeout=60).updates
    runner.stop()

    assert [list(update.token_ids) for update in updates] == [[5], [6], []]
    assert updates[-1].finish is FinishReason.FAULT


async def test_failed_steps_and_bad_rows_are_hidden_by_a_retry() -> None:
    faults = {"faults": "raise_step=7,nan_row=11"}
    async with running_worker(EchoEngine()) as sound:
        targets = [f"127.0.0.1:{sound.server.port}"]
        async with running_tier([EchoEngine()], worker_settings=faults, extra_workers=targets) as tier:
            texts = [f"answer {number}" for number in range(20)]
            answers = await asyncio.gather(*(collect(tier.client, prompt(text)) for text in texts))

            assert [answer.text for answer in answers] == texts


_CRASH = """
import sys
from tests.worker.test_faults import FaultPlan, SequenceUpdate, faulty, sequence

inner, runner, updates = faulty(FaultPlan.parse(sys.argv[1]), 1)
inner.step(SequenceUpdate(0, 0, [7]))
runner.submit(sequence(2, [5, 6, 5]))
print("computed", len(updates), flush=True)
inner.step(SequenceUpdate(1, 0, [8]))
print("survived", flush=True)
"""


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        ("crash_after_tokens=2", -signal.SIGKILL),
        ("crash_on_id=6", -signal.SIGKILL),
        ("break_device_after_tokens=2", 1),
    ],
)
async def test_a_worker_that_is_to_die_dies_before_it_reports(faults: str, code: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _CRASH, faults), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()

    assert process.returncode == code
    assert output == b"computed 1\n"


async def test_a_worker_with_an_invalid_plan_does_not_start() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.worker", "--engine", "echo", "--faults", "nan=1"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, output = await process.communicate()

    assert process.returncode == 2
    assert b"HEADRACE_FAULTS" in output
