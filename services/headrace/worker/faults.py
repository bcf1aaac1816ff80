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

from headrace.worker.engine.interface import Engine, Fault, ModelInfo, Row, Token

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The faults to inject; 0 for never.

    step_delay           seconds added to each step
    crash_after_tokens   the process is killed by SIGKILL before it returns the token of this number
    stall_after_tokens   the engine hangs before it returns the token of this number; the process runs on
    raise_step           the step of this number, and of each multiple, raises
    nan_row              the token of this number, and of each multiple, cannot be sampled
    crash_on_id          the process is killed when it computes a prompt that contains this token id
    """

    step_delay: float = 0.0
    crash_after_tokens: int = 0
    stall_after_tokens: int = 0
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

    def step(self, rows: Sequence[Row], *rest: Any) -> list[Token | Fault | None]:
        """See `Engine.step`."""
        plan = self._plan
        self._steps += 1
        if plan.step_delay:
            time.sleep(plan.step_delay)
        if plan.crash_on_id and any(plan.crash_on_id in row.ids[row.start : row.stop] for row in rows):
            _crash()
        if plan.raise_step and self._steps % plan.raise_step == 0:
            raise RuntimeError("this step fails on purpose (--faults)")
        return [self._spoil(result) for result in self._inner.step(rows, *rest)]

    def _spoil(self, result: Token | Fault | None) -> Token | Fault | None:
        if not isinstance(result, Token):
            return result
        plan = self._plan
        self._tokens += 1
        if self._tokens == plan.crash_after_tokens:
            _crash()
        if self._tokens == plan.stall_after_tokens:
            threading.Event().wait()
        if plan.nan_row and self._tokens % plan.nan_row == 0:
            return Fault("the logits are not finite, on purpose (--faults)")
        return result


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # until the signal is delivered
