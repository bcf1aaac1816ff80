"""Measure what mutual TLS on all connections of a mesh costs, and bearer tokens and limits of callers.

    python -m benchmarks.security [--streams 1 8 64] [--seconds 8] [--repeat 5] [--json FILE]

Meshes of real processes with echo engines run beside each other, without security and with it, and are
measured in turns. Each has a client, a router, a batcher and a worker, so a token passes three connections.

ttft        from the request to the first token, on a connection that is open
tokens/s    of all streams together, each of which makes one request after the other
CPU         of router, batcher and worker per 1,000 tokens, and of the client, which is this process
connect     from the first packet of a new connection to the first token over it
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.mesh.answers import Answer, ask, closed_loop
from benchmarks.mesh.cpu import SERVICES, per_request
from benchmarks.mesh.systems import EngineSpec, Served, System, in_turn, progress, serving
from benchmarks.mesh.tables import show_table
from benchmarks.quotas import QUOTAS

TOKENS = 64
CONNECTIONS = 20  # of each repetition
PLAINTEXT = "plaintext"


@dataclass(frozen=True)
class Run:
    """One run; times in seconds.

    cpu             of all services, per token
    cpu_ratio       that, to the first system's in the same repetition: the machine's load changes more
                    between repetitions than within one
    """

    what: str
    streams: int
    ttft: float
    ttft_p99: float
    tokens_per_second: float
    cpu: float
    client_cpu: float
    cpu_ratio: float = 1.0


def systems(folder: Path) -> list[System]:
    """Return the systems that are measured. A file of limits is written to *folder*."""
    quotas = folder / "quotas.toml"
    quotas.write_text(QUOTAS)
    limited = {"HEADRACE_QUOTAS": str(quotas)}
    return [
        System(PLAINTEXT),
        System("tokens", tokens=True),
        System("mutual TLS", tls=True),
        System("mutual TLS, tokens", tls=True, tokens=True),
        System("mutual TLS, tokens, limits", tls=True, tokens=True, environment=limited),
    ]


async def measure(arguments: argparse.Namespace) -> tuple[list[Run], dict[str, float]]:
    """Return the medians of all repetitions: by system and streams, and of new connections by system."""
    runs: dict[tuple[int, str], list[Run]] = {}
    connects: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        served = await stack.enter_async_context(serving(systems(folder), EngineSpec(arguments.step_seconds)))
        for streams in arguments.streams:
            for repetition in range(arguments.repeat + 1):
                turn = {
                    name: await _run(served[name], streams, arguments.seconds)
                    for name in in_turn(list(served), repetition)
                }
                progress(f"{streams} streams, repetition {repetition} of {arguments.repeat}")
                for name, run in turn.items() if repetition else ():  # the first one warms up
                    ratio = run.cpu / turn[PLAINTEXT].cpu
                    runs.setdefault((streams, name), []).append(replace(run, cpu_ratio=ratio))
        for repetition in range(arguments.repeat):
            for name in in_turn(list(served), repetition):
                for _ in range(CONNECTIONS):
                    connects.setdefault(name, []).append(await _connect(served[name]))
    return (
        [_median(runs[streams, name]) for streams in arguments.streams for name in connects],
        {name: statistics.median(connects[name]) for name in connects},
    )


async def _run(served: Served, streams: int, seconds: float) -> Run:
    began, before = time.perf_counter(), served.cpu_seconds()
    done = await closed_loop(streams, seconds, lambda number: ask(served.client, number, TOKENS))
    took, after = time.perf_counter() - began, served.cpu_seconds()
    answers = [answer for answer in done if isinstance(answer, Answer)]
    tokens = sum(answer.tokens for answer in answers)
    cpu = per_request(before, after, tokens)
    waits = sorted(answer.first - answer.began for answer in answers)
    return Run(
        served.name,
        streams,
        statistics.median(waits),
        waits[math.ceil(0.99 * len(waits)) - 1],
        tokens / took,
        sum(cpu[kind] for kind in SERVICES),
        cpu["client"],
    )


async def _connect(served: Served) -> float:
    began = time.perf_counter()
    async with served.connection.open() as client:
        answer = await ask(client, 0, 1)
    return answer.first - began


def _median(runs: Sequence[Run]) -> Run:
    """Return the medians of the figures of equal runs, each on its own."""
    names = ("ttft", "ttft_p99", "tokens_per_second", "cpu", "client_cpu", "cpu_ratio")
    return Run(
        runs[0].what,
        runs[0].streams,
        *(statistics.median(getattr(run, name) for run in runs) for name in names),
    )


def show(runs: Sequence[Run], connects: dict[str, float]) -> None:
    """Print the figures as tables."""
    show_table(
        f"cost of TLS, tokens and limits: answers of {TOKENS} tokens",
        ("streams", "what", "ttft ms", "p99", "tokens/s", "CPU ms/1000", "client CPU"),
        [
            [
                str(run.streams),
                run.what,
                f"{run.ttft * 1e3:.2f}",
                f"{run.ttft_p99 * 1e3:.2f}",
                f"{run.tokens_per_second:.0f}",
                f"{run.cpu * 1e6:.1f}",
                f"{run.client_cpu * 1e6:.1f}",
            ]
            for run in runs
        ],
    )
    show_table(
        f"CPU of the services against {PLAINTEXT}",
        ("streams", "what", "%"),
        [[str(run.streams), run.what, f"{(run.cpu_ratio - 1) * 100:+.0f}"] for run in runs],
    )
    show_table(
        "first token over a new connection",
        ("what", "ms"),
        [[name, f"{seconds * 1e3:.2f}"] for name, seconds in connects.items()],
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=8.0, help="of one run")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="of a step of the engine")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    arguments = parser.parse_args()
    runs, connects = asyncio.run(measure(arguments))
    show(runs, connects)
    if arguments.json:
        figures = {"runs": [asdict(run) for run in runs], "connect_seconds": connects}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
