"""Answer the same requests with an echo engine in this process, without any service."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager

from benchmarks.mesh.answers import TIMEOUT, Answer, prompt
from benchmarks.mesh.systems import EngineSpec
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import SamplingParams, SequenceSpec, StepReport


class EngineAlone:
    """An engine that runs; use `engine_alone` to create it. Times are taken on the engine's thread."""

    def __init__(self, spec: EngineSpec) -> None:
        engine = EchoEngine(max_running=spec.max_running, step_seconds=spec.step_seconds)
        self.loop: EngineLoop[int] = EngineLoop(engine, step_tokens=spec.step_tokens)
        self._answers: dict[int, Answer] = {}
        self._left = 0  # answers that are not complete
        self._done = threading.Event()
        self._steps = 0
        self.loop.start(self._on_report)

    def ask(self, numbers: Iterable[int], tokens: int) -> list[Answer]:
        """Answer requests that start at the same time. Blocks."""
        prompts = [(number, list(prompt(number).encode())) for number in numbers]
        self._steps, self._left = 0, len(prompts)
        self._done.clear()
        began = time.perf_counter()
        self._answers = {number: Answer(began) for number, _ in prompts}
        for number, ids in prompts:
            params = SamplingParams(seed=0, max_tokens=tokens, ignore_eos=True)
            self.loop.submit(SequenceSpec(number, ids, len(ids), params, submitted=time.monotonic()))
        if not self._done.wait(TIMEOUT):
            raise TimeoutError(f"the engine alone did not answer within {TIMEOUT:g} s")
        answers = list(self._answers.values())
        answers[0].messages = self._steps  # one report carries the tokens of all sequences
        return answers

    def _on_report(self, report: StepReport[int]) -> None:
        self._steps += 1
        now = time.perf_counter()
        for update in report.updates:
            answer = self._answers[update.key]
            if update.token_ids:
                answer.arrivals.append((now, len(update.token_ids)))
            if update.finish is not None:
                answer.ended = now
                self._left -= 1
        if not self._left:
            self._done.set()


@contextmanager
def engine_alone(spec: EngineSpec) -> Generator[EngineAlone, None, None]:
    """Run an engine while the block runs."""
    engine = EngineAlone(spec)
    try:
        yield engine
    finally:
        engine.loop.stop()
