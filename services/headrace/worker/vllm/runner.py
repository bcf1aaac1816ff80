"""Run sequences on vLLM: the `Runner` over its AsyncLLM.

Everything happens on the event loop of one thread, which vLLM's output handler runs on as well. Submitted
sequences are sent to the engine core in the order of the calls, except those with grammars, which are checked
on a thread first. After each step, `step` takes what vLLM has put into the sequences' collectors and reports
it at once. Sequences that are cancelled, or whose deadline passes, are reported immediately; whatever vLLM
still sends for them is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic

from headrace.grammars.compiling import GrammarProblem
from headrace.worker.runner import (
    FinishReason,
    K,
    ModelInfo,
    SequenceSpec,
    SequenceUpdate,
    StepReport,
)
from headrace.worker.vllm.drawing.following import Structure
from headrace.worker.vllm.loop_thread import LoopThread
from headrace.worker.vllm.sequence import LiveSequence
from headrace.worker.vllm.step_totals import StepTotals

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 5.0  # for vLLM's processes to end, before they are killed
STOP_SECONDS = SHUTDOWN_SECONDS + 5.0
_URGENT = 9  # the highest of our priorities
_STEPS_OF_PRIORITY = 1000  # in 1: priorities are fractions, and vLLM's are integers


class VllmRunner(Generic[K]):
    """Drives one AsyncLLM; see `Runner`.

    engine                the AsyncLLM, made on *thread*
    parameters            translates a sequence's parameters into vLLM's
    step_tokens           most tokens that one step computes
    shared_block_tokens   granularity of the prefix cache; 0 if there is none
    structure             follows structured answers
    """

    def __init__(
        self,
        engine: Any,
        thread: LoopThread,
        model: ModelInfo,
        *,
        parameters: Callable[[SequenceSpec[K]], Any],
        step_tokens: int,
        shared_block_tokens: int,
        structure: Structure,
    ) -> None:
        self.model = model
        self.step_tokens = step_tokens
        self.shared_block_tokens = shared_block_tokens
        self._engine = engine
        self._thread = thread
        self._parameters = parameters
        self._structure = structure
        self._report: Callable[[StepReport[K]], None] = _discard
        self._live: dict[K, LiveSequence[K]] = {}
        self._entering: deque[LiveSequence[K]] = deque()
        self._intake = False  # whether `_enter_all` runs
        self._tasks: set[asyncio.Task[None]] = set()
        self._totals = StepTotals()
        self._uncomputed = 0  # ids of sequences whose prompt is not computed
        self._began = 0.0  # when the running step began, in seconds of time.monotonic()
        self._entered = 0  # sequences submitted so far
        self._stopping = False  # on the loop
        self._stopped = False  # for callers of `stop`

    def start(self, report: Callable[[StepReport[K]], None]) -> None:
        """Begin to run. *report* is called on the runner's thread."""
        self._report = report
        self._thread.call(self._guarded, self._watch)

    def submit(self, *specs: SequenceSpec[K]) -> None:
        """Queue sequences; their keys must be new."""
        self._thread.call(self._guarded, self._submit, specs)

    def cancel(self, *keys: K) -> None:
        """End sequences now."""
        self._thread.call(self._guarded, self._cancel, keys)

    def stop(self, *, seconds: float = STOP_SECONDS) -> None:
        """Report every sequence as cancelled, and end vLLM with its processes; blocks at most *seconds*.

        Further calls have no effect.
        """
        if self._stopped:
            return
        self._stopped = True
        try:
            self._thread.run(self._stop(), seconds)
        except TimeoutError:
            log.warning("vLLM does not stop, stopping without it", extra={"seconds": seconds})
        self._thread.stop(1.0)

    def step(self, engine: int, scheduler: Any, iteration: Any) -> None:
        """Report a step. vLLM's output handler calls it on the thread of the loop, after each step.

        engine                 number of the engine, of those of data parallelism
        scheduler, iteration   vLLM's SchedulerStats and IterationStats of the step
        """
        now = time.monotonic()
        size = self._totals.add(engine, scheduler, iteration)
        updates = [update for live in list(self._live.values()) if (update := self._take(live)) is not None]
        seconds = now - self._began
        self._began = now
        ended = time.time_ns()
        self._send(
            updates,
            rows=size.rows,
            tokens=size.tokens,
            decodes=size.decodes,
            seconds=seconds if size.rows else 0.0,
            started=ended - int(seconds * 1e9) if size.rows else 0,
            ended=ended if size.rows else 0,
        )

    def _watch(self) -> None:
        """End the process when vLLM's output handler ends: its engine core is dead."""
        self._engine.output_handler.add_done_callback(self._output_ended)

    def _output_ended(self, task: asyncio.Task[None]) -> None:
        if not self._stopping:
            log.error("vLLM's engine died, the worker exits; see its log above")
            os._exit(1)

    def _guarded(self, function: Callable[..., None], *arguments: object) -> None:
        # A worker that loses a command can only hang; a process that exits is noticed and replaced.
        try:
            function(*arguments)
        except BaseException:
            log.critical("the thread of vLLM's runner failed, the worker exits", exc_info=True)
            os._exit(1)

    def _submit(self, specs: Sequence[SequenceSpec[K]]) -> None:
        now = time.monotonic()
        refused = []
        for spec in specs:
            live = LiveSequence(spec, spec.resumed)
            if spec.key in self._live or self._stopping:
                reason = FinishReason.CANCELLED if self._stopping else FinishReason.FAULT
                refused.append(live.end(reason, "" if self._stopping else f"key {spec.key!r} is in use"))
                continue
            if not self._live:
                self._began = now  # nothing ran before
            self._live[spec.key] = live
            self._uncomputed += len(spec.ids)
            if spec.deadline.exists:
                live.timer = self._thread.loop.call_at(spec.deadline.at, self._guarded, self._expire, live)
            if spec.params.grammar:
                self._spawn(self._enter(live))
            else:
                self._entering.append(live)
        if refused:
            self._send(refused)
        if self._entering and not self._intake:
            self._intake = True
            self._spawn(self._enter_all())

    async def _enter_all(self) -> None:
        """Send the queued sequences to vLLM, in order."""
        try:
            while self._entering:
                await self._enter(self._entering.popleft())
        finally:
            self._intake = False

    async def _enter(self, live: LiveSequence[K]) -> None:
        """Send one sequence to vLLM; one that vLLM refuses ends."""
        if live.ended:
            return
        spec = live.spec
        self._entered += 1
        try:
            if spec.params.grammar:
                live.follower = await self._structure.follower(spec)
            collector = await self._engine.add_request(
                str(self._entered),
                _prompt(spec),
                self._parameters(spec),
                priority=round((_URGENT - spec.priority) * _STEPS_OF_PRIORITY),
            )
        except Exception as error:
            if live.ended:
                return
            if isinstance(error, GrammarProblem):
                self._end([live], FinishReason.INVALID, f"the grammar cannot be used: {error}")
                return
            log.exception("vLLM refuses a sequence")
            self._end([live], FinishReason.FAULT, str(error))
            return
        live.collector = collector
        if live.ended:  # meanwhile
            await self._engine.abort(collector.request_id, internal=True)
        elif (update := self._take(live)) is not None:
            self._send([update])  # no step may follow

    def _cancel(self, keys: Sequence[K]) -> None:
        self._end([live for key in keys if (live := self._live.get(key)) is not None], FinishReason.CANCELLED)

    def _expire(self, live: LiveSequence[K]) -> None:
        if not live.ended:
            self._end([live], FinishReason.DEADLINE)

    def _end(self, ending: Sequence[LiveSequence[K]], reason: FinishReason, fault: str = "") -> None:
        """End sequences for a reason of our own, after the tokens that have arrived, and report it."""
        updates = []
        for live in ending:
            if (update := self._take(live)) is not None:
                updates.append(update)
            if not live.ended:
                updates.append(live.end(reason, fault))
                self._forget(live)
        at_vllm = [live.collector.request_id for live in ending if live.collector is not None]
        if at_vllm and not self._stopping:
            self._spawn(self._engine.abort(at_vllm, internal=True))
        if updates:
            self._send(updates)

    def _take(self, live: LiveSequence[K]) -> SequenceUpdate[K] | None:
        """Return what has arrived of a sequence since the last time; None if nothing has."""
        if live.collector is None or (output := live.collector.get_nowait()) is None:
            return None
        uncomputed = not live.computed
        update = live.update(output)
        if live.computed and uncomputed:
            self._prompt_done(live)
        if live.ended:
            self._forget(live)
            if output.outputs[0].finish_reason is None and not self._stopping:  # its grammar is to blame
                self._spawn(self._engine.abort([live.collector.request_id], internal=True))
        return update

    def _forget(self, live: LiveSequence[K]) -> None:
        del self._live[live.spec.key]
        if not live.computed:
            live.computed = True
            self._prompt_done(live)

    def _prompt_done(self, live: LiveSequence[K]) -> None:
        tokens = len(live.spec.ids)
        self._uncomputed -= tokens
        self._totals.prefilled = min(max(self._totals.prefilled - tokens + live.cached, 0), self._uncomputed)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._thread.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._stopping:
            log.critical("a task of vLLM's runner failed, the worker exits", exc_info=error)
            os._exit(1)

    async def _stop(self) -> None:
        self._stopping = True
        self._entering.clear()
        self._structure.close()
        self._end(list(self._live.values()), FinishReason.CANCELLED)
        self._engine.output_handler.cancel()  # it would log the end of the engine core as a failure
        # On another thread: vLLM closes its sockets on this loop.
        await asyncio.to_thread(self._engine.shutdown, SHUTDOWN_SECONDS)

    def _send(
        self,
        updates: Sequence[SequenceUpdate[K]],
        *,
        rows: int = 0,
        tokens: int = 0,
        decodes: int = 0,
        seconds: float = 0.0,
        started: int = 0,
        ended: int = 0,
    ) -> None:
        """Report a step, or sequences that ended between two steps."""
        totals, live = self._totals, self._live
        # After the last sequence was aborted, no step corrects vLLM's figures.
        usage = totals.kv_usage if live else 0.0
        waiting = min(totals.waiting, len(live))
        oldest = 0.0
        if waiting:
            submitted = min((one.spec.submitted for one in live.values() if not one.computed), default=None)
            oldest = time.monotonic() - submitted if submitted is not None else 0.0
        self._report(
            StepReport(
                updates=updates,
                rows=rows,
                tokens=tokens,
                decodes=decodes,
                seconds=seconds,
                started=started,
                ended=ended,
                running=min(totals.running, len(live)),
                waiting=waiting,
                kv_tokens_free=int(self.model.kv_tokens * (1 - usage)),
                cached_tokens=totals.cached_tokens,
                preemptions=totals.preemptions,
                uncomputed_prompt_tokens=max(self._uncomputed - totals.prefilled, 0),
                oldest_wait=oldest,
            )
        )


def _prompt(spec: SequenceSpec[K]) -> dict[str, Any]:
    """Return a sequence's ids in vLLM's form.

    The scope of the prefix cache becomes vLLM's salt.
    """
    prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": list(spec.ids)}
    if spec.scope:
        prompt["cache_salt"] = spec.scope.hex()
    return prompt


def _discard(report: StepReport[K]) -> None:
    """Receive reports until the runner is started; there are none."""
