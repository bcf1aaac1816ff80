"""Run the engine's steps on a thread of their own: the `Runner` over our engine.

The thread owns engine and scheduler. Callers pass commands from any thread and receive a report of each step
through one callback, called on the engine's thread: the worker queues it there for its event loop (see
`flow.delivery`). A running step cannot be interrupted, so a cancelled sequence ends before the next one.

For an engine that runs ahead, step n + 1 is planned and launched before the results of step n are awaited,
so that the device does not wait for this thread. Step n is reported after the launch of step n + 2, because
the threads that handle the report compete with this one for Python's lock.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

from headrace.grammars.matching import Matcher
from headrace.worker.engine.grammar.preparation import Preparation, Preparing, ended_early
from headrace.worker.engine.interface import (
    Engine,
    EngineBroken,
    Fault,
    LaunchedStep,
    ModelInfo,
    Result,
)
from headrace.worker.engine.plan.scheduler import Scheduler
from headrace.worker.engine.plan.sequences import PlannedStep
from headrace.worker.engine.plan.speculation import Speculation
from headrace.worker.runner import FinishReason, K, SequenceSpec, SequenceUpdate, StepReport

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0  # how long a running step may take to end when the process stops


@dataclass(slots=True)
class _Flight(Generic[K]):
    """A launched step that is not applied yet.

    launched   None if its launch failed
    planned    seconds of time.monotonic() when it was planned
    started    time.time_ns() at its launch
    """

    step: PlannedStep[K]
    launched: LaunchedStep | None
    planned: float
    started: int


class EngineLoop(Generic[K]):
    """Drives one engine; see `Runner`.

    step_tokens, prefix_cache   as for `Scheduler`
    speculation                 whether rows get drafts, which the engine must support
    """

    def __init__(
        self,
        engine: Engine,
        *,
        step_tokens: int = 512,
        prefix_cache: bool = True,
        speculation: bool = False,
    ) -> None:
        self._engine = engine
        self._report: Callable[[StepReport[K]], None] = _discard
        self._scheduler: Scheduler[K] = Scheduler(
            engine.model,
            step_tokens=step_tokens,
            prefix_cache=prefix_cache,
            speculation=Speculation() if speculation else None,
        )
        self._preparation: Preparation[K] = Preparation(
            engine.grammars, lambda own, outcome: self._command(partial(self._add_prepared, own, outcome))
        )
        self.shared_block_tokens = engine.model.block_tokens if prefix_cache else 0
        self._unreported: list[StepReport[K]] = []
        self._in_flight: deque[_Flight[K]] = deque()
        self._done, self._ended = 0.0, 0  # when the last step returned, in seconds and in time.time_ns()
        # One ordered queue for all commands: a cancel that comes too late for its sequence must not end the
        # next one of the same key, submitted after it.
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def model(self) -> ModelInfo:
        """The engine's model."""
        return self._engine.model

    @property
    def step_tokens(self) -> int:
        """Most tokens that one step computes."""
        return self._scheduler.step_tokens

    def start(self, report: Callable[[StepReport[K]], None]) -> None:
        """Start the thread.

        report   called on it after each step and whenever sequences end: immediately if no step follows,
                 else when the next step is launched
        """
        self._report = report
        self._thread.start()

    def stop(self, *, seconds: float = STOP_SECONDS) -> None:
        """Let the running step end, report every sequence as cancelled, and join the thread.

        A step that does not end within *seconds* is abandoned: a device that hangs must not keep the process
        running.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        self._preparation.stop()
        if self._thread.is_alive():
            log.warning("engine step does not end, stopping without it", extra={"seconds": seconds})

    def submit(self, *specs: SequenceSpec[K]) -> None:
        """Queue sequences; their keys must be new. One that the scheduler rejects ends with FAULT."""
        plain = [spec for spec in specs if not spec.params.grammar]
        preparing = [self._preparation.enter(spec) for spec in specs if spec.params.grammar]
        self._command(partial(self._add, plain), *(partial(self._hold, own) for own in preparing))
        for own in preparing:
            self._preparation.start(own)

    def cancel(self, *keys: K) -> None:
        """Let sequences end before the next step."""
        self._command(partial(self._cancel, keys))

    def _command(self, *commands: Callable[[], None]) -> None:
        """Queue commands for the engine's thread."""
        with self._changed:
            self._commands.extend(commands)
            self._changed.notify()

    def _cancel(self, keys: Sequence[K]) -> None:
        self._scheduler.cancel(keys)
        self._preparation.cancel(keys)

    def _add(self, specs: Sequence[SequenceSpec[K]], matcher: Matcher | None = None) -> None:
        for spec in specs:
            try:
                if spec.key in self._preparation:
                    raise ValueError(f"key {spec.key!r} is in use")
                self._scheduler.add(spec, matcher)
            except ValueError as error:
                log.exception("a sequence cannot be scheduled")
                self._queue_report([ended_early(spec, FinishReason.FAULT, str(error))])

    def _hold(self, own: Preparing[K]) -> None:
        """Hold a sequence back until its grammar is compiled."""
        if own.spec.key in self._preparation:
            error = f"key {own.spec.key!r} is in use"
            self._queue_report([ended_early(own.spec, FinishReason.FAULT, error)])
        elif (matcher := self._preparation.hold(own)) is not None:
            self._add([own.spec], matcher)

    def _add_prepared(self, own: Preparing[K], outcome: Matcher | Fault) -> None:
        """Add a sequence whose grammar is compiled, unless it has ended."""
        if not self._preparation.take(own):
            return
        if isinstance(outcome, Fault):
            reason = FinishReason.INVALID if outcome.invalid else FinishReason.FAULT
            self._queue_report([ended_early(own.spec, reason, outcome.message)])
        else:
            self._add([own.spec], outcome)

    def _main(self) -> None:
        # A worker without its engine can only hang; a process that exits is noticed and replaced.
        try:
            self._run()
        except EngineBroken as error:
            log.error("the device failed, the worker exits", extra={"reason": str(error)})
            os._exit(1)
        except BaseException:
            log.critical("the engine's thread died", exc_info=True)
            os._exit(1)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            with self._changed:
                while not (self._commands or self._stopping or self._in_flight or not self._scheduler.idle):
                    if not self._changed.wait(self._preparation.timeout(time.monotonic())):
                        break  # the deadline of a sequence passes while its grammar is being compiled
                commands, self._commands = self._commands, deque()
                stopping = self._stopping
            for command in commands:
                command()
            if stopping:
                self._scheduler.cancel_all()
                self._preparation.cancel_all()
            self._advance()
        assert not self._in_flight, "no step follows the last one, so it was awaited"

    def _advance(self) -> None:
        """Remove sequences that must end, launch a step, and await the results that are due."""
        scheduler = self._scheduler
        now = time.monotonic()
        ended = [*scheduler.remove_ended(now), *self._preparation.remove_ended(now)]
        if ended:
            self._queue_report(ended)
        planned = time.monotonic()
        step = scheduler.plan(planned)
        launched = self._launch(step, planned) if step.rows else False
        if self._in_flight:
            self._send_reports()  # an engine that computes on this thread has not begun yet
        # After a failed launch, tokens that the next step would continue with will never be known.
        while len(self._in_flight) > (self._engine.ahead if launched else 0):
            self._land(self._in_flight.popleft())
        if scheduler.idle:
            self._send_reports()

    def _launch(self, step: PlannedStep[K], planned: float) -> bool:
        """Launch a step. Returns whether that succeeded; it is in flight in any case."""
        started, launched = time.time_ns(), None
        try:
            launched = self._engine.launch(step.rows)
        except EngineBroken:
            raise
        except Exception:
            log.exception("engine step cannot be launched", extra={"rows": len(step.rows)})
        self._in_flight.append(_Flight(step, launched, planned, started))
        return launched is not None

    def _land(self, flight: _Flight[K]) -> None:
        """Wait for the results of a step, record and report them."""
        step, scheduler = flight.step, self._scheduler
        results = self._results(flight)
        ended, done = time.time_ns(), time.monotonic()
        updates = scheduler.apply(step, results, done)
        self._queue_report(
            updates,
            rows=len(step.rows),
            tokens=step.tokens,
            decodes=scheduler.decodes,
            drafted=step.drafted,
            accepted=scheduler.accepted,
            dropped=scheduler.dropped,
            # A device begins with a step when it is done with the one before.
            seconds=done - max(flight.planned, self._done),
            started=max(flight.started, self._ended),
            ended=ended,
        )
        self._done, self._ended = done, ended

    def _results(self, flight: _Flight[K]) -> Sequence[Result]:
        if flight.launched is not None:
            try:
                return flight.launched.wait()
            except EngineBroken:
                raise
            except Exception:
                log.exception("engine step failed", extra={"rows": len(flight.step.rows)})
        # The contents of the rows' blocks are unknown: all sequences of this step end, others continue. Those
        # of the step after it are dropped there. No other sequence uses these blocks, see `scheduler`.
        return [Fault("the engine failed in this step")] * len(flight.step.rows)

    def _queue_report(
        self,
        updates: Sequence[SequenceUpdate[K]],
        *,
        rows: int = 0,
        tokens: int = 0,
        decodes: int = 0,
        drafted: int = 0,
        accepted: int = 0,
        dropped: int = 0,
        seconds: float = 0.0,
        started: int = 0,
        ended: int = 0,
    ) -> None:
        """Make a report, and keep it until the next step is launched."""
        scheduler, preparing, now = self._scheduler, self._preparation.specs, time.monotonic()
        waited = max((now - spec.submitted for spec in preparing), default=0.0)
        self._unreported.append(
            StepReport(
                updates=updates,
                rows=rows,
                tokens=tokens,
                decodes=decodes,
                drafted=drafted,
                accepted=accepted,
                dropped=dropped,
                seconds=seconds,
                started=started,
                ended=ended,
                running=scheduler.running,
                waiting=scheduler.waiting + len(preparing),
                kv_tokens_free=scheduler.kv_tokens_free,
                cached_tokens=scheduler.cached_tokens,
                preemptions=scheduler.preemptions,
                uncomputed_prompt_tokens=scheduler.uncomputed_prompt_tokens
                + sum(len(spec.ids) for spec in preparing),
                oldest_wait=max(scheduler.oldest_wait(now), waited),
            )
        )

    def _send_reports(self) -> None:
        reports, self._unreported = self._unreported, []
        for report in reports:
            self._report(report)


def _discard(report: StepReport[K]) -> None:
    """Receive reports until the loop is started; there are none."""
