"""What the mesh itself costs: an echo engine through all three services, against the same engine alone.

    python -m benchmarks.mesh [--streams 1 8 64] [--tokens 256] [--repeat 3] [--step-seconds 0]

The mesh runs as real processes on loopback: router, batcher, worker. The engine computes nothing, so what
is measured is messages, serialisation and scheduling. With --step-seconds the engine sleeps as a model
would compute, which shows the time that the mesh adds per token. Every answer is checked against its
prompt: none lost, none mixed up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.cli.mesh import MeshSpec, TierSpec, mesh
from headrace.client import Client, connect
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.loop import EngineLoop, StepReport
from headrace.worker.engine.scheduler import LiveSequence
from headrace.worker.engine.seam import SamplingParams


@dataclass(frozen=True)
class Figures:
    """One run. Times in seconds, rates per second."""

    what: str
    streams: int
    tokens: int
    seconds: float
    tokens_per_second: float
    messages_per_second: float
    ttft_p50: float
    ttft_max: float
    tpot_p50: float


def figures(what: str, seconds: float, messages: int, streams: list[tuple[float, float, int]]) -> Figures:
    """Sum up one run; *streams* are (first token after, last token after, tokens)."""
    tokens = sum(count for _, _, count in streams)
    firsts = sorted(first for first, _, _ in streams)
    return Figures(
        what,
        len(streams),
        tokens,
        seconds,
        tokens / seconds,
        messages / seconds,
        statistics.median(firsts),
        firsts[-1],
        statistics.median((last - first) / (count - 1) for first, last, count in streams),
    )


def prompt(number: int) -> str:
    """A prompt unlike all others of the run."""
    return f"stream {number:03} says hello, "


async def through_mesh(client: Client, streams: int, tokens: int) -> Figures:
    """Run *streams* requests at once through the mesh."""
    messages = 0

    async def one(number: int) -> tuple[float, float, int]:
        nonlocal messages
        text = prompt(number)
        request = pb.GenerateRequest(prompt=text, sampling=pb.Sampling(max_tokens=tokens, ignore_eos=True))
        said, first, last = "", 0.0, 0.0
        async with aclosing(client.generate(request, timeout=300)) as stream:
            async for response in stream:
                messages += 1
                if response.HasField("delta"):
                    last = time.perf_counter() - began
                    first = first or last
                    said += response.delta.text
        expected = (text * (tokens // len(text) + 1))[:tokens]
        if said != expected:
            raise SystemExit(
                f"stream {number} was lost or mixed up: {said[:60]!r} instead of {expected[:60]!r}"
            )
        return first, last, tokens

    began = time.perf_counter()
    done = await asyncio.gather(*(one(number) for number in range(streams)))
    return figures("mesh", time.perf_counter() - began, messages, list(done))


def engine_alone(streams: int, tokens: int, step_seconds: float) -> Figures:
    """Run the same requests on an engine loop in this process, without any service."""
    firsts: dict[int, float] = {}
    lasts: dict[int, float] = {}
    steps = 0
    done = threading.Event()

    def hear(report: StepReport[int]) -> None:
        nonlocal steps
        steps += 1
        now = time.perf_counter() - began
        for update in report.updates:
            key = update.sequence.key
            firsts.setdefault(key, now)
            if update.ending is not None:
                lasts[key] = now
        if len(lasts) == streams:
            done.set()

    engine = EchoEngine(max_running=64, step_seconds=step_seconds)
    loop: EngineLoop[int] = EngineLoop(engine, report=hear)
    loop.start()
    began = time.perf_counter()
    for number in range(streams):
        ids = list(prompt(number).encode())
        params = SamplingParams(seed=0, max_tokens=tokens, ignore_eos=True)
        loop.submit(LiveSequence(number, ids, len(ids), params, None, time.monotonic()))
    done.wait(300)
    seconds = time.perf_counter() - began
    loop.stop()
    return figures("engine", seconds, steps, [(firsts[key], lasts[key], tokens) for key in firsts])


def median_of(runs: list[Figures]) -> Figures:
    """The run with the median rate."""
    return sorted(runs, key=lambda run: run.tokens_per_second)[len(runs) // 2]


async def measure(arguments: argparse.Namespace) -> list[Figures]:
    """Measure engine and mesh, interleaved, and keep the median runs."""
    kept = []
    with tempfile.TemporaryDirectory() as folder:
        spec = MeshSpec(
            cache=Path(folder),
            log_dir=Path(folder) / "logs",
            tiers=[TierSpec("only")],
            fake=True,
            fake_step_seconds=arguments.step_seconds,
            flags={"worker": ["--max-running", "64"]},
        )
        async with mesh(spec) as running, connect(running.address) as client:
            await through_mesh(client, 4, arguments.tokens)  # everything is imported and connected
            for streams in arguments.streams:
                runs: dict[str, list[Figures]] = {"engine": [], "mesh": []}
                for _ in range(arguments.repeat):
                    alone = await asyncio.to_thread(
                        engine_alone, streams, arguments.tokens, arguments.step_seconds
                    )
                    runs["engine"].append(alone)
                    runs["mesh"].append(await through_mesh(client, streams, arguments.tokens))
                kept += [median_of(runs["engine"]), median_of(runs["mesh"])]
    return kept


def show(kept: list[Figures]) -> None:
    """Print the runs as a table."""
    table = Table(title=f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    for heading in ("streams", "what", "tokens/s", "messages/s", "TTFT p50 ms", "TTFT max ms", "TPOT p50 ms"):
        table.add_column(heading, justify="right")
    for run in kept:
        table.add_row(
            str(run.streams),
            run.what,
            f"{run.tokens_per_second:,.0f}",
            f"{run.messages_per_second:,.0f}",
            f"{run.ttft_p50 * 1e3:.1f}",
            f"{run.ttft_max * 1e3:.1f}",
            f"{run.tpot_p50 * 1e3:.3f}",
        )
    Console().print(table)


def main() -> None:
    """Parse flags, measure, print, and write build/bench-mesh.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=256, help="tokens per answer")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median is shown")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="what a step of the engine takes")
    arguments = parser.parse_args()
    kept = asyncio.run(measure(arguments))
    show(kept)
    out = Path("build/bench-mesh.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([asdict(run) for run in kept], indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
