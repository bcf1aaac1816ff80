"""Faults are injected as planned, whichever runner computes, and only then."""

from __future__ import annotations

import asyncio
import queue
import signal
import sys
from collections.abc import Callable

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
    """A runner whose reports the test makes."""

    step_tokens = 8
    shared_block_tokens = 0

    def __init__(self) -> None:
        self.model: ModelInfo = EchoEngine().model
        self.submitted: list[SequenceSpec[int]] = []
        self.cancelled: list[int] = []
        self.stopped = False
        self.report: Callable[[StepReport[int]], None] = lambda report: None

    def start(self, report: Callable[[StepReport[int]], None]) -> None:
        self.report = report

    def submit(self, *specs: SequenceSpec[int]) -> None:
        self.submitted += specs

    def cancel(self, *keys: int) -> None:
        self.cancelled += keys

    def stop(self) -> None:
        self.stopped = True


def faulty(plan: FaultPlan) -> tuple[HandRunner, Runner[int], list[SequenceUpdate[int]]]:
    """Return a runner, the same with faults, and the updates that arrive."""
    inner = HandRunner()
    runner: Runner[int] = FaultyRunner(inner, plan)
    updates: list[SequenceUpdate[int]] = []
    runner.start(lambda report: updates.extend(report.updates))
    return inner, runner, updates


def step(*updates: SequenceUpdate[int]) -> StepReport[int]:
    return StepReport(updates, rows=len(updates))


def test_without_a_fault_everything_passes() -> None:
    inner, runner, updates = faulty(FaultPlan(nan_row=100))
    spec = SequenceSpec(1, [5], 1, SamplingParams(seed=0, max_tokens=9))
    runner.submit(spec)
    runner.cancel(1)
    inner.report(step(SequenceUpdate(1, 0, [7, 8])))
    runner.stop()

    assert (inner.submitted, inner.cancelled, inner.stopped) == ([spec], [1], True)
    assert [list(update.token_ids) for update in updates] == [[7, 8]]
    assert (runner.model, runner.step_tokens, runner.shared_block_tokens) == (inner.model, 8, 0)


def test_a_bad_row_ends_its_sequence_after_the_tokens_before_it() -> None:
    inner, _, updates = faulty(FaultPlan(nan_row=3))
    inner.report(step(SequenceUpdate(1, 4, [7, 8, 9, 10]), SequenceUpdate(2, 0, [5])))
    inner.report(step(SequenceUpdate(1, 8, [11]), SequenceUpdate(1, 9, finish=FinishReason.CANCELLED)))
    inner.report(step(SequenceUpdate(1, 0, [20])))  # another sequence of the same key

    assert inner.cancelled == [1, 1]
    assert [(update.key, list(update.token_ids), update.finish) for update in updates] == [
        (1, [7, 8], FinishReason.FAULT),
        (2, [5], None),
        (1, [], FinishReason.FAULT),
    ]
    assert "on purpose" in updates[0].fault


def test_a_failed_step_ends_all_its_sequences() -> None:
    inner, _, updates = faulty(FaultPlan(raise_step=2))
    inner.report(step(SequenceUpdate(1, 0, [7])))
    inner.report(step(SequenceUpdate(1, 1, [8]), SequenceUpdate(2, 0, [5], finish=FinishReason.STOP)))

    assert inner.cancelled == [1], "the other one has ended"
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
from tests.worker.test_faults import FaultPlan, SamplingParams, SequenceSpec, SequenceUpdate, faulty, step

inner, runner, updates = faulty(FaultPlan.parse(sys.argv[1]))
inner.report(step(SequenceUpdate(1, 0, [7])))
runner.submit(SequenceSpec(2, [5, 6, 5], 3, SamplingParams(seed=0, max_tokens=9)))
print("computed", len(updates), flush=True)
inner.report(step(SequenceUpdate(2, 0, [8])))
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
