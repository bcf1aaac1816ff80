"""Answer the same requests with an echo engine in this process, without any service."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Generator
from contextlib import contextmanager

from benchmarks.mesh.answers import TIMEOUT, Answer, prompt
from benchmarks.mesh.systems import EngineSpec
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import SamplingParams, SequenceSpec, StepReport


class EngineAlone:
    """An engine that runs; use `engine_alone` to create it. Tokens are timed on the engine's thread."""

    def __init__(self, spec: EngineSpec) -> None:
        engine = EchoEngine(max_running=spec.max_running, step_seconds=spec.step_seconds)
        self.loop: EngineLoop[int] = EngineLoop(engine, step_tokens=spec.step_tokens)
        self._keys = itertools.count()
        self._waiting: dict[int, tuple[Answer, asyncio.Future[None]]] = {}
        self.loop.start(self._on_report)

    async def ask(self, number: int, tokens: int) -> Answer:
        """Answer one request, as `answers.ask` does through the mesh."""
        ids, key, done = list(prompt(number).encode()), next(self._keys), asyncio.Future[None]()
        answer = Answer(time.perf_counter())
        self._waiting[key] = answer, done
        params = SamplingParams(seed=0, max_tokens=tokens, ignore_eos=True)
        self.loop.submit(SequenceSpec(key, ids, len(ids), params, submitted=time.monotonic()))
        async with asyncio.timeout(TIMEOUT):
            await done
        return answer

    def _on_report(self, report: StepReport[int]) -> None:
        now = time.perf_counter()
        for update in report.updates:
            answer, done = self._waiting[update.key]
            if update.token_ids:
                answer.arrivals.append((now, len(update.token_ids)))
            if update.finish is not None:
                answer.ended = now
                del self._waiting[update.key]
                done.get_loop().call_soon_threadsafe(done.set_result, None)


@contextmanager
def engine_alone(spec: EngineSpec) -> Generator[EngineAlone, None, None]:
    """Run an engine while the block runs."""
    engine = EngineAlone(spec)
    try:
        yield engine
    finally:
        engine.loop.stop()
