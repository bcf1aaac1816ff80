"""Measure what scheduler and engine loop cost the host per step, with a device that computes nothing.

    python -m benchmarks.host_time [--rows 256] [--steps 1000] [--ahead 0] [--profile]

All rows decode. The figures are the time of the engine's thread between the calls of the engine, per step: to
plan, to record the results and to report them. What an engine costs the host itself, and what the receiver of
the reports does on other threads, is not included.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import queue
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.worker.engine.interface import Fault, ModelInfo, Row, Token
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import SamplingParams, SequenceSpec, StepReport

PROMPT = 1024
WARM_UP = 50  # steps


@dataclass
class Spent:
    """Seconds of the engine's thread outside the engine: of its CPU time, and by the clock."""

    cpu: float
    wall: float


class StubDevice:
    """Answers each row with a token at once, and records the time between its calls."""

    def __init__(self, rows: int, tokens: int, ahead: int) -> None:
        self.ahead = ahead
        self.steps: list[Spent] = []
        blocks = -(-(PROMPT + tokens + 1) // 32)
        self.model = ModelInfo(
            name="stub",
            revision="1",
            dtype="none",
            device="stub",
            tokenizer_fingerprint="",
            weights_fingerprint="",
            context_length=PROMPT + tokens + 1,
            vocabulary_size=1 << 17,
            eos_ids=frozenset({0}),
            max_running=rows,
            block_tokens=32,
            kv_blocks=rows * blocks + rows,
            exact=True,
        )
        self._token = Token(7)
        self._spent = Spent(0.0, 0.0)
        self._left: Spent | None = None

    def launch(self, rows: Sequence[Row]) -> StubStep:
        """Return a step that is computed already."""
        self.enter()
        if len(rows) == self.model.max_running == sum(row.sample for row in rows):
            self.steps.append(self._spent)
        self._spent = Spent(0.0, 0.0)
        results: list[Token | Fault | None] = [self._token if row.sample else None for row in rows]
        step = StubStep(self, results)
        self.leave()
        return step

    def enter(self) -> None:
        """Add up the time since the last call."""
        if self._left is not None:
            self._spent.cpu += time.thread_time() - self._left.cpu
            self._spent.wall += time.perf_counter() - self._left.wall

    def leave(self) -> None:
        """Begin to measure again."""
        self._left = Spent(time.thread_time(), time.perf_counter())


class StubStep:
    """A step whose results are known."""

    def __init__(self, device: StubDevice, results: list[Token | Fault | None]) -> None:
        self._device = device
        self._results = results

    def wait(self) -> list[Token | Fault | None]:
        """Return the results."""
        self._device.enter()
        self._device.leave()
        return self._results


def measure(rows: int, steps: int, *, ahead: int = 1, profile: bool = False) -> list[Spent]:
    """Run *rows* sequences for *steps* decode steps. Returns what each step cost, after a warm-up."""
    device = StubDevice(rows, steps + WARM_UP, ahead)
    loop: EngineLoop[int] = EngineLoop(device, step_tokens=2048)
    params = SamplingParams(seed=0, max_tokens=steps + WARM_UP, ignore_eos=True)
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
    return device.steps[WARM_UP:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ahead", type=int, choices=(0, 1), default=1)
    parser.add_argument("--profile", action="store_true", help="print a profile; its figures are too high")
    args = parser.parse_args()
    seen = measure(args.rows, args.steps, ahead=args.ahead, profile=args.profile)
    for name, values in (("cpu", [step.cpu for step in seen]), ("wall", [step.wall for step in seen])):
        values.sort()
        print(
            f"{name:5}{args.rows} rows: median {statistics.median(values) * 1e3:.3f} ms per step,"
            f" 90 % within {values[len(values) * 9 // 10] * 1e3:.3f} ms"
        )


if __name__ == "__main__":
    main()
