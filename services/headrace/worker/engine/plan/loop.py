"""Run the engine's steps on a thread of their own: the `Runner` over our engine.

The thread owns engine and scheduler. Callers pass commands from any thread and receive a report of each step
through one callback, called on the engine's thread: the worker turns it into one `call_soon_threadsafe` per
step. An engine on an asynchronous device overlaps the callback with the next step. A running step cannot be
interrupted, so a cancelled sequence ends before the next one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic

from headrace.worker.engine.interface import Engine, Fault, ModelInfo, Row, Token
from headrace.worker.engine.plan.scheduler import Scheduler
from headrace.worker.runner import FinishReason, K, SequenceSpec, SequenceUpdate, StepReport

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0  # how long a running step may take to end when the process stops


class EngineLoop(Generic[K]):
    """Drives one engine; see `Runner`.

    step_tokens, prefix_cache   as for `Scheduler`
    """

    def __init__(self, engine: Engine, *, step_tokens: int = 512, prefix_cache: bool = True) -> None:
        self._engine = engine
        self._report: Callable[[StepReport[K]], None] = _discard
        self._scheduler: Scheduler[K] = Scheduler(
            engine.model, step_tokens=step_tokens, prefix_cache=prefix_cache
        )
        self.shared_block_tokens = engine.model.block_tokens if prefix_cache else 0
        self._unreported: list[StepReport[K]] = []
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
        if self._thread.is_alive():
            log.warning("engine step does not end, stopping without it", extra={"seconds": seconds})

    def submit(self, *specs: SequenceSpec[K]) -> None:
        """Queue sequences; their keys must be new. One that the scheduler rejects ends with FAULT."""
        with self._changed:
            self._commands.append(partial(self._add, specs))
            self._changed.notify()

    def cancel(self, *keys: K) -> None:
        """Let sequences end before the next step."""
        with self._changed:
            self._commands.append(partial(self._scheduler.cancel, keys))
            self._changed.notify()

    def _add(self, specs: Sequence[SequenceSpec[K]]) -> None:
        for spec in specs:
            try:
                self._scheduler.add(spec)
            except ValueError as error:
                log.exception("a sequence cannot be scheduled")
                update = SequenceUpdate(spec.key, spec.resumed, finish=FinishReason.FAULT, fault=str(error))
                self._queue_report([update])

    def _main(self) -> None:
        try:
            self._run()
        except BaseException:
            # A worker without its engine can only hang; a process that exits is noticed and replaced.
            log.critical("the engine's thread died", exc_info=True)
            os._exit(1)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._commands or self._stopping or not self._scheduler.idle):
                    self._changed.wait()
                commands, self._commands = self._commands, deque()
                stopping = self._stopping
            for command in commands:
                command()
            if stopping:
                self._scheduler.cancel_all()
            self._run_step()
            if stopping:
                return

    def _run_step(self) -> None:
        """Remove sequences that must end, then compute one step."""
        scheduler = self._scheduler
        ended_early = scheduler.remove_ended(time.monotonic())
        if ended_early:
            self._queue_report(ended_early)
        now = time.monotonic()
        rows = scheduler.plan(now)
        if rows:
            started = time.time_ns()
            results = self._compute(rows)
            ended = time.time_ns()
            done = time.monotonic()
            self._queue_report(
                scheduler.apply(rows, results, done),
                rows=len(rows),
                tokens=scheduler.tokens,
                seconds=done - now,
                started=started,
                ended=ended,
            )
        if scheduler.idle:
            self._send_reports()

    def _compute(self, rows: list[Row]) -> list[Token | Fault | None]:
        try:
            return self._engine.step(rows, self._send_reports)
        except Exception:
            # The contents of the rows' blocks are unknown: all sequences of this step end, others continue.
            log.exception("engine step failed", extra={"rows": len(rows)})
            return [Fault("the engine failed in this step")] * len(rows)

    def _queue_report(
        self,
        updates: Sequence[SequenceUpdate[K]],
        *,
        rows: int = 0,
        tokens: int = 0,
        seconds: float = 0.0,
        started: int = 0,
        ended: int = 0,
    ) -> None:
        """Make a report, and keep it until the next step is launched."""
        scheduler = self._scheduler
        self._unreported.append(
            StepReport(
                updates=updates,
                rows=rows,
                tokens=tokens,
                decodes=scheduler.decodes if rows else 0,
                seconds=seconds,
                started=started,
                ended=ended,
                running=scheduler.running,
                waiting=scheduler.waiting,
                kv_tokens_free=scheduler.kv_tokens_free,
                cached_tokens=scheduler.cached_tokens,
                preemptions=scheduler.preemptions,
                uncomputed_prompt_tokens=scheduler.uncomputed_prompt_tokens,
                oldest_wait=scheduler.oldest_wait(time.monotonic()),
            )
        )

    def _send_reports(self) -> None:
        reports, self._unreported = self._unreported, []
        for report in reports:
            self._report(report)


def _discard(report: StepReport[K]) -> None:
    """Receive reports until the loop is started; there are none."""
