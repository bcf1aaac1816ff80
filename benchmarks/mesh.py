"""Measure the overhead of the mesh: an echo engine behind all three services, against the engine alone.

    python -m benchmarks.mesh [--streams 1 8 64 256] [--tokens 256] [--repeat 3] [--before CHECKOUT]

The mesh runs as real processes on loopback: one router, one batcher, one worker. The engine computes nothing,
so the figures show messages, serialisation and scheduling. There are two step times. With 10 ms, as a model
would take, the table shows what the mesh adds to TTFT and TPOT. With 0 it shows the token rate at which the
mesh saturates. --before also measures the services of another checkout, in turn with ours. Every answer is
checked against its prompt, so that lost or mixed-up tokens are detected.
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
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.cli.launch.mesh import MeshSpec, TierSpec, mesh
from headrace.client import Client, connect
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import SamplingParams, SequenceSpec, StepReport

MAX_RUNNING, STEP_TOKENS = 256, 128  # of the engine, alone and in the mesh


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
    gap_p99: float
    step_seconds: float


def figures(
    what: str,
    step_seconds: float,
    seconds: float,
    messages: int,
    streams: list[tuple[float, float, int]],
    gaps: list[float],
) -> Figures:
    """Summarize one run.

    streams   of each: seconds to its first and to its last token, and number of tokens
    gaps      seconds between the messages of a stream; empty if each answer is one message
    """
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
        sorted(gaps)[int(len(gaps) * 0.99)] if gaps else 0.0,
        step_seconds,
    )


def prompt(number: int) -> str:
    """Return a prompt that differs from all others of the run."""
    return f"stream {number:03} says hello, "


async def through_mesh(
    client: Client, streams: int, tokens: int, step_seconds: float, what: str = "mesh"
) -> Figures:
    """Run *streams* requests at once through the mesh."""
    messages = 0
    gaps: list[float] = []

    async def one(number: int) -> tuple[float, float, int]:
        nonlocal messages
        text = prompt(number)
        request = pb.GenerateRequest(prompt=text, sampling=pb.Sampling(max_tokens=tokens, ignore_eos=True))
        answer, first, last = "", 0.0, 0.0
        async with aclosing(client.generate(request, timeout=300)) as stream:
            async for response in stream:
                messages += 1
                if response.HasField("delta"):
                    now = time.perf_counter() - began
                    if first:
                        gaps.append(now - last)
                    last = now
                    first = first or now
                    answer += response.delta.text
        expected = (text * (tokens // len(text) + 1))[:tokens]
        if answer != expected:
            raise SystemExit(
                f"stream {number} has a wrong answer: {answer[:60]!r} instead of {expected[:60]!r}"
            )
        return first, last, tokens

    began = time.perf_counter()
    done = await asyncio.gather(*(one(number) for number in range(streams)))
    return figures(what, step_seconds, time.perf_counter() - began, messages, list(done), gaps)


def engine_alone(streams: int, tokens: int, step_seconds: float) -> Figures:
    """Run the same requests on an engine loop in this process, without any service."""
    firsts: dict[int, float] = {}
    lasts: dict[int, float] = {}
    steps = 0
    done = threading.Event()

    latest: dict[int, float] = {}
    gaps: list[float] = []

    def on_report(report: StepReport[int]) -> None:
        nonlocal steps
        steps += 1
        now = time.perf_counter() - began
        for update in report.updates:
            key = update.key
            firsts.setdefault(key, now)
            if key in latest:
                gaps.append(now - latest[key])
            latest[key] = now
            if update.finish is not None:
                lasts[key] = now
        if len(lasts) == streams:
            done.set()

    engine = EchoEngine(max_running=MAX_RUNNING, step_seconds=step_seconds)
    loop: EngineLoop[int] = EngineLoop(engine, step_tokens=STEP_TOKENS)
    loop.start(on_report)
    began = time.perf_counter()
    for number in range(streams):
        ids = list(prompt(number).encode())
        params = SamplingParams(seed=0, max_tokens=tokens, ignore_eos=True)
        loop.submit(SequenceSpec(number, ids, len(ids), params, submitted=time.monotonic()))
    done.wait(300)
    seconds = time.perf_counter() - began
    loop.stop()
    streamed = [(firsts[key], lasts[key], tokens) for key in firsts]
    return figures("engine", step_seconds, seconds, steps, streamed, gaps)


def median_of(runs: list[Figures]) -> Figures:
    """Return the run with the median rate."""
    return sorted(runs, key=lambda run: run.tokens_per_second)[len(runs) // 2]


async def measure(arguments: argparse.Namespace, step_seconds: float) -> list[Figures]:
    """Measure engine and mesh, and the mesh of another checkout, in turn; return the median runs."""
    kept: list[Figures] = []
    checkouts = {"mesh": None, **({"before": arguments.before} if arguments.before else {})}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clients: dict[str, Client] = {}
        for name, checkout in checkouts.items():
            spec = MeshSpec(
                cache=folder,
                log_dir=folder / name,
                tiers=[TierSpec("only")],
                fake=True,
                fake_step_seconds=step_seconds,
                environment={"PYTHONPATH": str(checkout / "services")} if checkout else {},
                flags={
                    "worker": ["--max-running", str(MAX_RUNNING), "--step-tokens", str(STEP_TOKENS)],
                    "batcher": ["--queue-limit", str(2 * MAX_RUNNING)],
                },
            )
            running = await stack.enter_async_context(mesh(spec))
            clients[name] = await stack.enter_async_context(connect(running.address))
            # Warm up: everything is imported and connected.
            await through_mesh(clients[name], 4, arguments.tokens, step_seconds)
        for streams in arguments.streams:
            runs: dict[str, list[Figures]] = {"engine": [], **{name: [] for name in clients}}
            for _ in range(arguments.repeat):
                alone = asyncio.to_thread(engine_alone, streams, arguments.tokens, step_seconds)
                runs["engine"].append(await alone)
                for name, client in clients.items():
                    runs[name].append(
                        await through_mesh(client, streams, arguments.tokens, step_seconds, name)
                    )
            kept += [median_of(one) for one in runs.values()]
    return kept


def show(kept: list[Figures]) -> None:
    """Print the runs of one step time as a table."""
    step_ms = kept[0].step_seconds * 1e3
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    table = Table(title=f"a step takes {step_ms:g} ms; {machine}")
    headings = ("streams", "what", "tokens/s", "messages/s", "TTFT p50 ms", "added", "TPOT p50 ms", "added")
    for heading in (*headings, "gap p99 ms"):
        table.add_column(heading, justify="right")
    alone = kept[0]
    for run in kept:
        if run.what == "engine":
            alone = run
        added = run is not alone
        table.add_row(
            str(run.streams),
            run.what,
            f"{run.tokens_per_second:,.0f}",
            f"{run.messages_per_second:,.0f}",
            f"{run.ttft_p50 * 1e3:.1f}",
            f"{(run.ttft_p50 - alone.ttft_p50) * 1e3:+.1f}" if added else "",
            f"{run.tpot_p50 * 1e3:.3f}",
            f"{(run.tpot_p50 - alone.tpot_p50) * 1e3:+.3f}" if added else "",
            f"{run.gap_p99 * 1e3:.1f}",
        )
    Console(width=110).print(table)


def main() -> None:
    """Parse flags, measure, print, and write build/bench-mesh.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--tokens", type=int, default=256, help="tokens per answer")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median is shown")
    parser.add_argument(
        "--step-seconds", type=float, nargs="+", default=[0.01, 0.0], help="times of an engine step"
    )
    parser.add_argument("--before", type=Path, help="another checkout, whose services are also measured")
    arguments = parser.parse_args()
    kept: list[Figures] = []
    for step_seconds in arguments.step_seconds:
        runs = asyncio.run(measure(arguments, step_seconds))
        show(runs)
        kept += runs
    out = Path("build/bench-mesh.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([asdict(run) for run in kept], indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
