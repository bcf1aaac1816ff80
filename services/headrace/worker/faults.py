"""Inject faults into a worker, to test that callers do not notice them. Off without `--faults`.

HEADRACE_FAULTS=step_delay=0.05,crash_after_tokens=100 python -m headrace.worker --fake
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from headrace.worker.engine.interface import (
    Engine,
    EngineBroken,
    Fault,
    Grammars,
    LaunchedStep,
    ModelInfo,
    Result,
    Row,
    Token,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The faults to inject; 0 for never.

    step_delay                  seconds added to each step
    crash_after_tokens          the process is killed by SIGKILL before it returns the token of this number
    stall_after_tokens          the engine hangs before it returns the token of this number; the rest runs on
    break_device_after_tokens   the device is lost before it returns the token of this number
    raise_step                  the step of this number, and of each multiple, raises
    nan_row                     the token of this number, and of each multiple, cannot be sampled
    crash_on_id                 the process is killed when it computes a prompt that contains this token id
    """

    step_delay: float = 0.0
    crash_after_tokens: int = 0
    stall_after_tokens: int = 0
    break_device_after_tokens: int = 0
    raise_step: int = 0
    nan_row: int = 0
    crash_on_id: int = 0

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """Parse "name=value,name=value". Raises ValueError with the reason."""
        kinds = {field.name: float if field.name == "step_delay" else int for field in fields(cls)}
        values: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in kinds:
                raise ValueError(f"{name!r} is not a fault; choose from {', '.join(kinds)}")
            try:
                values[name] = kinds[name](value)
            except ValueError:
                raise ValueError(f"{part!r}: the value must be a number") from None
            if values[name] < 0:
                raise ValueError(f"{part!r}: the value must be 0 or more")
        return cls(**values)


class FaultyEngine:
    """Computes what *inner* computes, and fails as planned."""

    def __init__(self, inner: Engine, plan: FaultPlan) -> None:
        self._inner = inner
        self._plan = plan
        self._steps = 0
        self._tokens = 0
        log.warning("faults are injected", extra={"plan": str(plan)})

    @property
    def model(self) -> ModelInfo:
        """The model of the inner engine."""
        return self._inner.model

    @property
    def grammars(self) -> Grammars | None:
        """The grammars of the inner engine."""
        return self._inner.grammars

    @property
    def ahead(self) -> int:
        """How far the inner engine runs ahead."""
        return self._inner.ahead

    def launch(self, rows: Sequence[Row]) -> FaultyStep:
        """See `Engine.launch`."""
        plan = self._plan
        self._steps += 1
        if plan.crash_on_id and any(plan.crash_on_id in row.ids[row.start : row.stop] for row in rows):
            _crash()
        if plan.raise_step and self._steps % plan.raise_step == 0:
            raise RuntimeError("this step fails on purpose (--faults)")
        return FaultyStep(self, self._inner.launch(rows))

    def wait(self, step: LaunchedStep) -> list[Result]:
        """Return the results of a step of the inner engine, with faults."""
        if self._plan.step_delay:
            time.sleep(self._plan.step_delay)
        return [self._spoil(result) for result in step.wait()]

    def _spoil(self, result: Result) -> Result:
        if not isinstance(result, Token):
            return result
        plan = self._plan
        self._tokens += 1
        if self._tokens == plan.crash_after_tokens:
            _crash()
        if self._tokens == plan.stall_after_tokens:
            threading.Event().wait()
        if self._tokens == plan.break_device_after_tokens:
            raise EngineBroken("the device is lost on purpose (--faults)")
        if plan.nan_row and self._tokens % plan.nan_row == 0:
            return Fault("the logits are not finite, on purpose (--faults)")
        return result


@dataclass(frozen=True, slots=True)
class FaultyStep:
    """A launched step of a faulty engine."""

    engine: FaultyEngine
    step: LaunchedStep

    def wait(self) -> list[Result]:
        """See `LaunchedStep.wait`."""
        return self.engine.wait(self.step)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # until the signal is delivered
