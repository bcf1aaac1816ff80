"""Run the engine's steps on one thread of its own, and hear what callers ask between them.

The thread owns engine and scheduler. Callers hand commands in from any thread and hear of each step
through one callback, called on the engine's thread: the worker's service turns it into a single
`call_soon_threadsafe` a step. Where a device computes by itself, that is done while it computes the next
step. A running step cannot be interrupted, so what was cancelled leaves before the next one.
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

from headrace.worker.engine.interface import Engine, Fault, Row, Token
from headrace.worker.engine.plan.scheduler import Ending, LiveSequence, Scheduler, Update

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

STOP_SECONDS = 5.0  # that a step under way has to end when the process does


@dataclass(frozen=True, slots=True)
class StepReport(Generic[K]):
    """One step, or one round of departures without a step.

    rows, tokens, seconds   of the step: rows computed, ids computed, wall time; 0 without one
    started, ended          time.time_ns() around the step
    running, waiting        sequences, when it was over
    kv_tokens_free          tokens that KV memory had room for then
    cached_tokens           ids found in KV memory instead of computed, since the start
    preemptions             since the start
    """

    updates: list[Update[K]] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    started: int = 0
    ended: int = 0
    running: int = 0
    waiting: int = 0
    kv_tokens_free: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    uncomputed_prompt_tokens: int = 0
    oldest_wait: float = 0.0


class EngineLoop(Generic[K]):
    """Drives one engine.

    report                      called on the engine's thread after each step and each departure: at once
                                where nothing follows, else when the next step's computation is launched
    step_tokens, prefix_cache   as for `Scheduler`
    """

    def __init__(
        self,
        engine: Engine,
        *,
        report: Callable[[StepReport[K]], None],
        step_tokens: int = 512,
        prefix_cache: bool = True,
    ) -> None:
        self._engine = engine
        self._report = report
        self._scheduler: Scheduler[K] = Scheduler(
            engine.model, step_tokens=step_tokens, prefix_cache=prefix_cache
        )
        self._untold: list[StepReport[K]] = []
        # One queue for all, in order: a cancel that comes too late for its sequence must not hit the next
        # one of the same key, handed in after it.
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, *, seconds: float = STOP_SECONDS) -> None:
        """Let the running step end, report every sequence as cancelled, and join the thread.

        A step that does not end within *seconds* is left behind: a device that hangs must not keep its
        process.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("the engine's step does not end, stopping without it", extra={"seconds": seconds})

    def submit(self, sequence: LiveSequence[K]) -> None:
        """Hand a sequence in; its key must be new. One that the scheduler does not take ends as a fault."""
        with self._wake:
            self._commands.append(partial(self._add, sequence))
            self._wake.notify()

    def cancel(self, key: K) -> None:
        """Let a sequence leave before the next step."""
        with self._wake:
            self._commands.append(partial(self._scheduler.cancel, key))
            self._wake.notify()

    def _add(self, sequence: LiveSequence[K]) -> None:
        try:
            self._scheduler.add(sequence)
        except ValueError as error:
            log.exception("a sequence cannot be scheduled")
            update = Update(sequence, sequence.answered, ending=Ending.FAULT, fault=str(error))
            self._note(StepReport(updates=[update]))

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
        scheduler = self._scheduler
        departed = scheduler.expel(time.monotonic())
        if departed:
            self._note(StepReport(updates=departed))
        now = time.monotonic()
        rows = scheduler.plan(now)
        if rows:
            started = time.time_ns()
            results = self._step(rows)
            ended = time.time_ns()
            done = time.monotonic()
            self._note(
                StepReport(
                    updates=scheduler.apply(rows, results, done),
                    rows=len(rows),
                    tokens=sum(row.stop - row.start for row in rows),
                    seconds=done - now,
                    started=started,
                    ended=ended,
                )
            )
        if scheduler.idle:
            self._tell()

    def _step(self, rows: list[Row]) -> list[Token | Fault | None]:
        try:
            return self._engine.step(rows, self._tell)
        except Exception:
            # What the rows' blocks hold now is unknown: every row of this step ends, later ones are unharmed.
            log.exception("engine step failed", extra={"rows": len(rows)})
            return [Fault("the engine failed in this step")] * len(rows)

    def _note(self, report: StepReport[K]) -> None:
        """Keep a report until the next computation is launched."""
        scheduler = self._scheduler
        self._untold.append(
            replace(
                report,
                running=scheduler.running,
                waiting=scheduler.waiting,
                kv_tokens_free=scheduler.kv_tokens_free,
                cached_tokens=scheduler.cached_tokens,
                preemptions=scheduler.preemptions,
                uncomputed_prompt_tokens=scheduler.uncomputed_prompt_tokens,
                oldest_wait=scheduler.oldest_wait(time.monotonic()),
            )
        )

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        for report in untold:
            self._report(report)
