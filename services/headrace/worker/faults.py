"""Inject faults into a worker, to test that callers do not notice them. Off without `--faults`.

HEADRACE_FAULTS=step_delay=0.05,crash_after_tokens=100 python -m headrace.worker --engine echo
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic

from headrace.worker.runner import (
    FinishReason,
    K,
    ModelInfo,
    Runner,
    SequenceSpec,
    SequenceUpdate,
    StepReport,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The faults to inject; 0 for never.

    step_delay                  seconds added to each step
    crash_after_tokens          the process is killed by SIGKILL before it reports the token of this number
    stall_after_tokens          the runner hangs before it reports the token of this number; the rest runs on
    break_device_after_tokens   the process exits, as when a device is lost, before it reports this token
    raise_step                  the step of this number, and of each multiple, fails: its sequences end
    nan_row                     the token of this number, and of each multiple, cannot be sampled: its
                                sequence ends
    crash_on_id                 the process is killed when it has computed a step after the submission of a
                                prompt that contains this token id
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


class FaultyRunner(Generic[K]):
    """Computes what *inner* computes, and fails as planned, whichever engine it runs."""

    def __init__(self, inner: Runner[Any], plan: FaultPlan) -> None:
        self._inner = inner
        self._plan = plan
        self._report: Callable[[StepReport[K]], None] = lambda report: None
        self._steps = 0
        self._tokens = 0
        self._poisoned = False  # whether a prompt contains the id to crash on
        # A sequence that ends by a fault ends later at the inner runner, and its key may be used again at
        # once. So the inner runner gets keys that are never used again.
        self._submitted = 0
        self._inner_keys: dict[K, tuple[K, int]] = {}
        self._failed: set[tuple[K, int]] = set()  # ended by a fault, and not yet at the inner runner
        log.warning("faults are injected", extra={"plan": str(plan)})

    @property
    def model(self) -> ModelInfo:
        """The model of the inner runner."""
        return self._inner.model

    @property
    def step_tokens(self) -> int:
        """As of the inner runner."""
        return self._inner.step_tokens

    @property
    def shared_block_tokens(self) -> int:
        """As of the inner runner."""
        return self._inner.shared_block_tokens

    def start(self, report: Callable[[StepReport[K]], None]) -> None:
        """See `Runner.start`."""
        self._report = report
        self._inner.start(self._spoil)

    def submit(self, *specs: SequenceSpec[K]) -> None:
        """See `Runner.submit`."""
        crash = self._plan.crash_on_id
        self._poisoned = self._poisoned or bool(crash and any(crash in spec.ids for spec in specs))
        inner: list[SequenceSpec[Any]] = []
        for spec in specs:
            self._submitted += 1
            own = self._inner_keys[spec.key] = spec.key, self._submitted
            renamed: SequenceSpec[Any] = spec
            inner.append(dataclasses.replace(renamed, key=own))
        self._inner.submit(*inner)

    def cancel(self, *keys: K) -> None:
        """See `Runner.cancel`."""
        known = map(self._inner_keys.get, keys)
        self._inner.cancel(*(own for own in known if own is not None))

    def stop(self) -> None:
        """See `Runner.stop`."""
        self._inner.stop()

    def _spoil(self, report: StepReport[Any]) -> None:
        """Pass a report on, with faults. Runs on the thread of the inner runner, which it holds up."""
        plan, fails = self._plan, False
        if report.rows:
            self._steps += 1
            time.sleep(plan.step_delay)
            if self._poisoned:
                _crash()
            fails = bool(plan.raise_step) and self._steps % plan.raise_step == 0
        updates = []
        for update in report.updates:
            if update.key in self._failed:
                if update.finish is not None:
                    self._failed.remove(update.key)
                continue
            if fails:
                update = self._fail(update, 0, "this step fails on purpose (--faults)")
            elif update.token_ids:
                update = self._with_token_faults(update)
            key = update.key[0]
            if update.finish is not None:
                del self._inner_keys[key]  # before the report, after which the key may be used again
            updates.append(dataclasses.replace(update, key=key))
        self._report(dataclasses.replace(report, updates=updates))

    def _with_token_faults(self, update: SequenceUpdate[Any]) -> SequenceUpdate[Any]:
        plan, first = self._plan, self._tokens + 1
        self._tokens += len(update.token_ids)
        numbers = range(first, self._tokens + 1)
        if plan.crash_after_tokens in numbers:
            _crash()
        if plan.stall_after_tokens in numbers:
            threading.Event().wait()
        if plan.break_device_after_tokens in numbers:
            log.error("the device failed, the worker exits", extra={"reason": "on purpose (--faults)"})
            os._exit(1)
        for index, number in enumerate(numbers):
            if plan.nan_row and number % plan.nan_row == 0:
                return self._fail(update, index, "the logits are not finite, on purpose (--faults)")
        return update

    def _fail(self, update: SequenceUpdate[Any], tokens: int, message: str) -> SequenceUpdate[Any]:
        """End a sequence after the first *tokens* new tokens of its update."""
        if update.finish is None:
            self._failed.add(update.key)
            self._inner.cancel(update.key)
        return dataclasses.replace(
            update,
            token_ids=update.token_ids[:tokens],
            logprobs=update.logprobs[:tokens],
            top=update.top[:tokens],
            finish=FinishReason.FAULT,
            fault=message,
        )


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # until the signal is delivered
