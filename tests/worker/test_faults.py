"""Faults are injected as planned, and only then."""

from __future__ import annotations

import asyncio
import queue
import sys

import pytest

from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import EngineBroken, Memo, Row, Token
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.faults import FaultPlan, FaultyEngine
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec, SequenceUpdate, StepReport
from tests.harness import collect, prompt
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


def test_a_broken_device_raises_before_it_returns_the_token() -> None:
    engine = FaultyEngine(EchoEngine(), FaultPlan(break_device_after_tokens=2))
    memo, params = Memo(), SamplingParams(seed=0, max_tokens=9)

    assert engine.launch([Row([0], 0, 2, [5, 6], 2, True, params, memo)]).wait() == [Token(5, 0.0)]
    with pytest.raises(EngineBroken, match="on purpose"):
        engine.launch([Row([0], 2, 3, [5, 6, 5], 2, True, params, memo)]).wait()


def test_faults_are_injected_into_an_engine_that_runs_ahead() -> None:
    plan = FaultPlan(nan_row=3, step_delay=0.001)
    engine = FaultyEngine(DeviceEngine(EchoEngine()), plan)
    loop: EngineLoop[int] = EngineLoop(engine)
    reports: queue.Queue[StepReport[int]] = queue.Queue()
    loop.start(reports.put)
    loop.submit(SequenceSpec(1, [5, 6], 2, SamplingParams(seed=0, max_tokens=9, ignore_eos=True)))
    updates: list[SequenceUpdate[int]] = []
    while not updates or updates[-1].finish is None:
        updates += reports.get(timeout=60).updates
    loop.stop()

    assert [list(update.token_ids) for update in updates] == [[5], [6], []]
    assert updates[-1].finish is FinishReason.FAULT


async def test_failed_steps_and_bad_rows_are_hidden_by_a_retry() -> None:
    plan = FaultPlan(raise_step=7, nan_row=11)
    async with running_tier([FaultyEngine(EchoEngine(), plan), EchoEngine()]) as tier:
        texts = [f"answer {number}" for number in range(20)]
        answers = await asyncio.gather(*(collect(tier.client, prompt(text)) for text in texts))

        assert [answer.text for answer in answers] == texts


async def test_a_worker_with_an_invalid_plan_does_not_start() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.worker", "--fake", "--faults", "nan=1"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, output = await process.communicate()

    assert process.returncode == 2
    assert b"HEADRACE_FAULTS" in output
