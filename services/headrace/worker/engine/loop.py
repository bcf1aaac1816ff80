"""Run the engine's steps on one thread of its own, and hear what callers ask between them.

The thread owns engine and scheduler. Callers hand commands in from any thread and hear of each step
through one callback, called on the engine's thread: the worker's service turns it into a single
`call_soon_threadsafe` a step. A running step cannot be interrupted, so what was cancelled leaves
before the next one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from headrace.worker.engine.scheduler import LiveSequence, Scheduler, Update
from headrace.worker.engine.seam import Engine, Fault, Row, Token

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class StepReport(Generic[K]):
    """One step, or one round of departures without a step.

    rows, tokens, seconds   of the step: rows computed, ids computed, wall time; 0 without one
    started, ended          time.time_ns() around the step
    """

    updates: list[Update[K]] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    started: int = 0
    ended: int = 0
    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    uncomputed_prompt_tokens: int = 0
    oldest_wait: float = 0.0


class EngineLoop(Generic[K]):
    """Drives one engine.

    report      called on the engine's thread after each step that changed something
    """

    def __init__(
        self, engine: Engine, *, report: Callable[[StepReport[K]], None], step_tokens: int = 512
    ) -> None:
        self._engine = engine
        self._report = report
        self._scheduler: Scheduler[K] = Scheduler(engine.model, step_tokens=step_tokens)
        # One queue for all, in order: a cancel that comes too late for its sequence must not hit the next
        # one of the same key, handed in after it.
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the running step end, report every sequence as cancelled, and join the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, sequence: LiveSequence[K]) -> None:
        """Hand a sequence in; its key must be new."""
        with self._wake:
            self._commands.append(partial(self._scheduler.add, sequence))
            self._wake.notify()

    def cancel(self, key: K) -> None:
        """Let a sequence leave before the next step."""
        with self._wake:
            self._commands.append(partial(self._scheduler.cancel, key))
            self._wake.notify()

    def _live(self) -> None:
        try:
            self._run()
        except BaseException:
            # A worker without its engine can only hang; a process that ends is noticed and replaced.
            log.critical("the engine's thread died", exc_info=True)
            os._exit(1)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._stopping or not self._scheduler.idle):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
                stopping = self._stopping
            for command in commands:
                command()
            if stopping:
                self._scheduler.cancel_all()
            self._turn()
            if stopping:
                return

    def _turn(self) -> None:
        """Let go who must leave, then compute one step."""
        updates, slots = self._scheduler.expel(time.monotonic())
        self._free(slots)
        if updates:
            self._tell(StepReport(updates=updates))
        now = time.monotonic()
        rows = self._scheduler.plan(now)
        if not rows:
            return
        started = time.time_ns()
        results = self._step(rows)
        ended = time.time_ns()
        done = time.monotonic()
        updates, slots = self._scheduler.apply(rows, results, done)
        self._free(slots)
        self._tell(
            StepReport(
                updates=updates,
                rows=len(rows),
                tokens=sum(row.stop - row.start for row in rows),
                seconds=done - now,
                started=started,
                ended=ended,
            )
        )

    def _step(self, rows: list[Row]) -> list[Token | Fault | None]:
        try:
            return self._engine.step(rows)
        except Exception:
            # What the slots hold now is unknown: every row of this step ends, later ones are unharmed.
            log.exception("engine step failed", extra={"rows": len(rows)})
            return [Fault("the engine failed in this step")] * len(rows)

    def _free(self, slots: list[int]) -> None:
        for slot in slots:
            self._engine.release(slot)

    def _tell(self, report: StepReport[K]) -> None:
        scheduler = self._scheduler
        self._report(
            replace(
                report,
                running=scheduler.running,
                waiting=scheduler.waiting,
                kv_tokens=scheduler.kv_tokens,
                uncomputed_prompt_tokens=scheduler.uncomputed_prompt_tokens,
                oldest_wait=scheduler.oldest_wait(time.monotonic()),
            )
        )
