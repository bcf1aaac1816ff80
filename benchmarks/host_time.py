"""Measure what a step of decodes costs the host, with a device that computes nothing.

    python -m benchmarks.host_time [--rows 256] [--steps 1000] [--profile]

loop     scheduler and loop alone: to plan, to record the results and to report them
engine   that, and what the engine of a GPU does on the host: fill the inputs of a step, copy them, launch
         the step and read its results. Its graphs are empty; without CUDA the copies are plain ones

The figures are the time of the engine's thread per step. What the receiver of the reports does on other
threads is not included.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import queue
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from headrace.runtime.serving.memory_reclaim import collect_less_often
from headrace.worker.engine.interface import Engine, LaunchedStep, ModelInfo, Result, Row, Token
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import SamplingParams, SequenceSpec, StepReport

PROMPT = 1024
WARM_UP = 50  # steps
STEP_TOKENS = 2048
VOCABULARY = 1024


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of the engine's thread: of its CPU time, and by the clock."""

    cpu: float
    wall: float


def describe(rows: int, tokens: int) -> ModelInfo:
    """Describe a model whose KV memory holds *rows* sequences of PROMPT and *tokens* more tokens."""
    blocks = -(-(PROMPT + tokens + 1) // 32)
    return ModelInfo(
        name="stub",
        revision="1",
        dtype="none",
        device="stub",
        tokenizer_fingerprint="",
        weights_fingerprint="",
        context_length=PROMPT + tokens + 1,
        vocabulary_size=VOCABULARY,
        eos_ids=frozenset({0}),
        max_running=rows,
        block_tokens=32,
        kv_blocks=rows * blocks + rows,
        exact=True,
    )


class StubDevice:
    """Answers each row with a token at once."""

    def __init__(self, model: ModelInfo, ahead: int = 1) -> None:
        self.model, self.ahead, self.grammars = model, ahead, None

    def launch(self, rows: Sequence[Row]) -> StubStep:
        """Return a step that is computed already."""
        return StubStep([_TOKEN if row.sample else None for row in rows])


class StubStep:
    """A step whose results are known."""

    def __init__(self, results: list[Result]) -> None:
        self._results = results

    def wait(self) -> list[Result]:
        """Return the results."""
        return self._results


_TOKEN = Token(7)


class EmptyGraphs:
    """Captures nothing, so that replaying costs nothing."""

    def waits(self, run: Callable[[], None]) -> str:
        """Return no reason."""
        return ""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does nothing."""
        return lambda: None


class NoForward:
    """Computes nothing: all steps are captured."""

    def reserve(self, tokens: int, rows: int) -> None:
        """Keep nothing."""

    def __call__(self, ids: torch.Tensor, step: object) -> torch.Tensor:
        """Fail."""
        raise AssertionError("a step was launched that is not captured")

    def logits_of(self, places: torch.Tensor) -> torch.Tensor:
        """Fail."""
        raise AssertionError("no row asks for log-probabilities")


def gpu_engine(model: ModelInfo) -> Engine:
    """Make the engine of a GPU, on CUDA if there is a device, whose steps always have the same results."""
    from headrace.worker.engine.gpu.engine import GpuEngine
    from headrace.worker.engine.gpu.slots import Slots

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    width = -(-model.context_length // model.block_tokens)
    engine = GpuEngine(
        NoForward(),
        model,
        slots=Slots(model.max_running, width, spare=model.kv_blocks, device=device),
        step_tokens=STEP_TOKENS,
        tile=16,
        graphs=EmptyGraphs(),
    )
    engine._results.fill_(1)  # ids, that logits are finite, and log-probabilities
    return engine


class Timed:
    """Records when steps are launched that are decodes of all rows."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.model, self.ahead, self.grammars = engine.model, engine.ahead, engine.grammars
        self._launches: list[Spent | None] = []

    def launch(self, rows: Sequence[Row]) -> LaunchedStep:
        """See `Engine.launch`."""
        whole = len(rows) == self.model.max_running == sum(row.stop - row.start for row in rows)
        self._launches.append(Spent(time.thread_time(), time.perf_counter()) if whole else None)
        return self._engine.launch(rows)

    def steps(self) -> list[Spent]:
        """Return the time from each launch to the next."""
        return [
            Spent(after.cpu - before.cpu, after.wall - before.wall)
            for before, after in pairwise(self._launches)
            if before is not None and after is not None
        ]


def measure(engine: Engine, steps: int, *, profile: bool = False) -> list[Spent]:
    """Run as many sequences as the engine can for *steps* decode steps. Returns what each step cost."""
    timed = Timed(engine)
    loop: EngineLoop[int] = EngineLoop(timed, step_tokens=STEP_TOKENS)
    params = SamplingParams(seed=0, max_tokens=steps + WARM_UP, ignore_eos=True)
    rows = engine.model.max_running
    # Prompts differ, so that no block is shared.
    loop.submit(*(SequenceSpec(key, [key + 1] * PROMPT, PROMPT, params) for key in range(rows)))
    reports: queue.SimpleQueue[StepReport[int]] = queue.SimpleQueue()
    profiler = cProfile.Profile() if profile else None
    if profiler is not None:
        run = loop._run
        loop._run = lambda: profiler.runcall(run)  # type: ignore[method-assign]
    loop.start(reports.put)
    ended = 0
    while ended < rows:
        ended += sum(update.finish is not None for update in reports.get().updates)
    loop.stop()
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(20)
    return timed.steps()[WARM_UP:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", action="store_true", help="print profiles; their figures are too high")
    args = parser.parse_args()
    collect_less_often()  # as a worker
    model = describe(args.rows, args.steps + WARM_UP)
    for name, engine in (("loop", StubDevice(model)), ("engine", gpu_engine(model))):
        seen = measure(engine, args.steps, profile=args.profile)
        for kind, values in (("cpu", [step.cpu for step in seen]), ("wall", [step.wall for step in seen])):
            values.sort()
            print(
                f"{name:7}{kind:5}{args.rows} rows: median {statistics.median(values) * 1e3:.3f} ms per step,"
                f" 90 % within {values[len(values) * 9 // 10] * 1e3:.3f} ms"
            )


if __name__ == "__main__":
    main()
