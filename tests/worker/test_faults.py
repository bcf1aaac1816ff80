"""Faults are injected as planned, and only then."""

from __future__ import annotations

import asyncio
import sys

import pytest

from headrace.worker.engine.echo import EchoEngine
from headrace.worker.faults import FaultPlan, FaultyEngine
from tests.harness import collect, prompt
from tests.tier import running_tier


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
