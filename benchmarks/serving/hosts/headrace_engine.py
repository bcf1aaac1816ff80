"""Run Headrace's engine without the mesh: its step loop, as in a worker, on token ids."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence

from benchmarks.serving.hosts.pipe import Pipe
from headrace.worker.engine.interface import Engine
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import SamplingParams, SequenceSpec, StepReport
from headrace.worker.settings import Settings


def load(
    model: str, dtype: str, threads: int, progress: Callable[[str], None] = print, **limits: int
) -> Engine:
    """Load a model as a worker does; "echo" is the engine without a model.

    limits   context_length and max_running, if not the defaults
    """
    if model == "echo":
        from headrace.worker.engine.echo import EchoEngine

        return EchoEngine()
    from headrace import models
    from headrace.worker.engine.load.loading import load_engine

    cache = models.cache_folder()
    return load_engine(
        models.resolve(model, cache),
        name=model,
        cache=cache,
        tokenizer_fingerprint="",
        dtype=dtype,
        threads=threads,
        progress=progress,
        **limits,  # type: ignore[arg-type]
    )


def start(
    engine: Engine,
    report: Callable[[StepReport[int]], None],
    *,
    step_tokens: int = 0,
    prefix_cache: bool = False,
    speculation: bool = False,
) -> EngineLoop[int]:
    """Start the step loop as a worker would.

    step_tokens    0 for the worker's default
    prefix_cache   off by default: repetitions of a workload would hit the cache
    speculation    only for an engine that verifies drafts
    """
    steps = step_tokens or Settings(engine="echo").tokens_per_step
    loop: EngineLoop[int] = EngineLoop(
        engine, step_tokens=steps, prefix_cache=prefix_cache, speculation=speculation
    )
    loop.start(report)
    return loop


def sequence(key: int, ids: Sequence[int], tokens: int, scope: bytes = b"") -> SequenceSpec[int]:
    """Return a greedy sequence of exactly *tokens* tokens."""
    params = SamplingParams(seed=0, max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return SequenceSpec(key, list(ids), len(ids), params, submitted=time.monotonic(), scope=scope)


def main() -> None:
    """Load the model, then serve the pipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speculation", choices=["lookup", "off"], default="off")
    arguments = parser.parse_args()
    pipe = Pipe()
    engine = load(arguments.model, arguments.dtype, arguments.threads)

    def on_report(report: StepReport[int]) -> None:
        pipe.tokens((update.key, update.token_ids) for update in report.updates if update.token_ids)

    loop = start(engine, on_report, speculation=arguments.speculation == "lookup")
    pipe.ready({"dtype": engine.model.dtype, "exact": str(engine.model.exact)})
    times: Counter[tuple[int, ...]] = Counter()
    while (asks := pipe.take(wait=True)) is not None:
        for ask in asks:
            # Speculative decoding would repeat the first answer to a prompt that is sent again.
            times[tuple(ask.prompt)] += 1
            repetition = str(times[tuple(ask.prompt)]).encode()
            loop.submit(sequence(ask.key, ask.prompt, ask.tokens, scope=repetition))
    loop.stop()


if __name__ == "__main__":
    main()
