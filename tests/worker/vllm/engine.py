"""An AsyncLLM without vLLM: the test decides what its engine core computes, and when."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from headrace.grammars.compiling import Grammars
from headrace.grammars.vocabulary import byte_vocabulary
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.runner import SequenceSpec, SequenceUpdate, StepReport
from headrace.worker.vllm.drawing.following import Structure
from headrace.worker.vllm.loop_thread import LoopThread
from headrace.worker.vllm.runner import VllmRunner
from tests.harness import PATIENCE


@dataclass(eq=False)
class Collector:
    """As vLLM's RequestOutputCollector, it merges the outputs that are not taken yet."""

    request_id: str
    prompt: dict[str, Any]
    priority: int
    output: Any = None

    def put(self, output: Any) -> None:
        if self.output is None:
            self.output = output
            return
        mine, new = self.output.outputs[0], output.outputs[0]
        mine.token_ids = [*mine.token_ids, *new.token_ids]
        mine.finish_reason = new.finish_reason

    def get_nowait(self) -> Any:
        output, self.output = self.output, None
        return output


def output(*ids: int, finish: str | None = None, cached: int = 0) -> Any:
    """Return a RequestOutput of new tokens, the end, or both."""
    part = SimpleNamespace(token_ids=list(ids), finish_reason=finish, logprobs=None)
    times = SimpleNamespace(scheduled_ts=1.0, first_token_ts=2.0, last_token_ts=3.0)
    return SimpleNamespace(outputs=[part], num_cached_tokens=cached, metrics=times, prompt_logprobs=None)


def statistics(*, prompt: int = 0, decodes: int = 0, running: int = 0, waiting: int = 0) -> Any:
    """Return the SchedulerStats of a step with *prompt* tokens of one prompt, and *decodes*."""
    details = SimpleNamespace(
        num_ctx_requests=int(prompt > 0),
        num_ctx_tokens=prompt,
        num_generation_requests=decodes,
        num_generation_tokens=decodes,
    )
    return SimpleNamespace(
        num_running_reqs=running,
        num_waiting_reqs=waiting,
        num_skipped_waiting_reqs=0,
        kv_cache_usage=0.5,
        iteration_details=details,
    )


@dataclass(eq=False)
class FakeEngine:
    """Keeps what it is asked for.

    refusal   is raised for each request
    enter     requests wait for it before they are in
    """

    refusal: Exception | None = None
    enter: asyncio.Event | None = None
    collectors: list[Collector] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    shut_down: bool = False
    output_handler: Any = None

    async def add_request(
        self, request_id: str, prompt: dict[str, Any], parameters: object, *, priority: int
    ) -> Collector:
        if self.enter is not None:
            await self.enter.wait()
        if self.refusal is not None:
            raise self.refusal
        self.collectors.append(Collector(f"internal {request_id}", prompt, priority))
        return self.collectors[-1]

    async def abort(self, ids: str | Iterable[str], *, internal: bool) -> None:
        assert internal
        names = [ids] if isinstance(ids, str) else list(ids)
        self.aborted += names
        for collector in self.collectors:
            if collector.request_id in names:
                collector.put(output(finish="abort"))

    def shutdown(self, timeout: float) -> None:
        self.shut_down = True


class Rig:
    """A runner over a `FakeEngine`, and the reports that arrive."""

    def __init__(self, engine: FakeEngine, parameters: Callable[[SequenceSpec[int]], Any]) -> None:
        self.engine = engine
        self.thread = LoopThread("fake vLLM")
        self.reports: queue.Queue[StepReport[int]] = queue.Queue()
        self.runner: VllmRunner[int] = VllmRunner(
            engine,
            self.thread,
            EchoEngine().model,
            parameters=parameters,
            step_tokens=64,
            shared_block_tokens=16,
            structure=Structure(Grammars(byte_vocabulary())),
        )
        engine.output_handler = self.thread.run(_forever())
        self.runner.start(self.reports.put)

    def settle(self) -> None:
        """Wait until the runner has done all that it can do."""
        for _ in range(20):
            self.thread.run(asyncio.sleep(0))

    def step(self, outputs: dict[int, Any], scheduler: Any = None, iteration: Any = None) -> StepReport[int]:
        """Let vLLM compute a step: outputs by number of the collector. Returns the report."""

        async def compute() -> None:
            for number, made in outputs.items():
                self.engine.collectors[number].put(made)
            self.runner.step(0, scheduler or statistics(decodes=len(outputs)), iteration)

        self.thread.run(compute())
        return self.report()

    def report(self) -> StepReport[int]:
        """Wait for the next report."""
        return self.reports.get(timeout=PATIENCE)

    def no_report(self) -> bool:
        """Whether nothing else is reported."""
        self.settle()
        return self.reports.empty()


def plain(updates: Sequence[SequenceUpdate[int]]) -> list[tuple[Any, ...]]:
    """Return the updates as tuples of key, offset, tokens and finish."""
    return [(one.key, one.offset, list(one.token_ids), one.finish) for one in updates]


async def _forever() -> asyncio.Task[Any]:
    return asyncio.create_task(asyncio.Event().wait())
