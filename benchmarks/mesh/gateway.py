"""Measure what the gateway adds: the same requests over HTTP and directly over gRPC, to the same mesh.

Both are sent by `headrace bench`'s backends, in turns. The HTTP client's own work is part of what is added:
it shares the two cores with everything else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import count

from benchmarks.mesh.answers import TIMEOUT, closed_loop
from benchmarks.mesh.paced import ANSWER_SECONDS, STALL_SECONDS, STEP_SECONDS, TOKENS
from benchmarks.mesh.rates import max_running
from benchmarks.mesh.systems import EngineSpec, Served, System, in_turn, progress, serving, window
from benchmarks.mesh.tables import milliseconds, show_table
from headrace.cli.bench.backends.backend import Backend
from headrace.cli.bench.backends.mesh import MeshBackend
from headrace.cli.bench.backends.openai import OpenAiOptions, connect_openai
from headrace.cli.bench.latencies import percentile
from headrace.cli.bench.prompts import Prompt
from headrace.cli.bench.records import Failed, Record

GRPC, HTTP = "gRPC", "HTTP"
STREAMS = (1, 64)
SHORT, SHORT_STEP = 16, 0.01  # tokens of an answer, seconds of a step
LATE_SECONDS = 0.1  # a gap that a reader notices


@dataclass(frozen=True)
class Edge:
    """One run.

    load          what was sent, in words
    streams       requests in flight at a time
    seconds       until the last answer was complete
    first_p50     time to first token, in seconds; so are the others
    untouched     share of streams without a gap above `STALL_SECONDS`
    unnoticed     share of streams without a gap above `LATE_SECONDS`
    cpu           CPU seconds, by process, this one as client
    others        cores that other processes used
    """

    what: str
    load: str
    streams: int
    completed: int
    failed: int
    seconds: float
    tokens: int
    first_p50: float
    first_p99: float
    gap_p99: float
    untouched: float
    unnoticed: float
    cpu: Mapping[str, float]
    others: float = 0.0


def edge(
    load: str, streams: int, records: Sequence[Record], seconds: float, cpu: Mapping[str, float]
) -> Edge:
    """Summarize a run."""
    whole = [record for record in records if record.complete]
    firsts = [record.ttft for record in whole]
    gaps = [gap for record in whole for gap in record.gaps]
    return Edge(
        "",
        load,
        streams,
        len(whole),
        len(records) - len(whole),
        seconds,
        sum(record.tokens for record in whole),
        percentile(firsts, 50),
        percentile(firsts, 99),
        percentile(gaps, 99),
        _without(whole, STALL_SECONDS) / len(records),
        _without(whole, LATE_SECONDS) / len(records),
        cpu,
    )


def _without(records: Sequence[Record], gap: float) -> int:
    return sum(max(record.gaps, default=0.0) <= gap for record in records)


async def measure(arguments: argparse.Namespace) -> list[Edge]:
    """Return the runs of short answers at each number of streams, and those of a steady pace."""
    kept: list[Edge] = []
    short = EngineSpec(SHORT_STEP)
    for streams in STREAMS:
        kept += await _runs(arguments, short, "short answers", streams, SHORT, spread=0.0)
    running = max_running(arguments.edge_streams)
    steady = EngineSpec(STEP_SECONDS, max_running=running, step_tokens=2 * running)
    kept += await _runs(
        arguments, steady, "steady pace", arguments.edge_streams, TOKENS, spread=ANSWER_SECONDS
    )
    return kept


async def _runs(
    arguments: argparse.Namespace, engine: EngineSpec, load: str, streams: int, tokens: int, *, spread: float
) -> list[Edge]:
    """Return the run of each way with the median time to first token."""
    runs: dict[str, list[Edge]] = {GRPC: [], HTTP: []}
    system = System("mesh", gateway=True)
    async with serving([system], engine) as served, AsyncExitStack() as stack:
        one = served[system.name]
        backends: dict[str, Backend] = {
            GRPC: MeshBackend(one.client, where=one.name),
            HTTP: await stack.enter_async_context(
                connect_openai(OpenAiOptions(url=f"{one.url}/v1", model="auto"), one.connection)
            ),
        }
        for backend in backends.values():
            await _load(one, backend, load, streams, tokens, arguments.seconds / 4, spread)
        for repetition in range(arguments.repeat):
            for name in in_turn(list(backends), repetition):
                async with window(served, arguments.patience) as measured:
                    run = await _load(one, backends[name], load, streams, tokens, arguments.seconds, spread)
                runs[name].append(replace(run, what=name, others=measured.others))
                progress(
                    f"gateway: {load}, {streams} streams, {name}, run {repetition + 1}: "
                    f"first token {milliseconds(run.first_p50)} ms"
                )
    return [sorted(each, key=lambda run: run.first_p50)[len(each) // 2] for each in runs.values()]


async def _load(
    one: Served, backend: Backend, load: str, streams: int, tokens: int, seconds: float, spread: float
) -> Edge:
    """Keep *streams* requests in flight for *seconds*; the first ones start evenly over *spread* seconds."""
    numbers = count()

    async def call(_: int) -> Record:
        text = f"stream {next(numbers):06} says hello, "
        now = time.perf_counter()
        record = Record(planned=now, sent=now)
        try:
            prompt = Prompt((("user", text),), max_tokens=tokens, exact=True)
            await backend.ask(prompt, record, timeout=TIMEOUT)
        except Failed as failure:
            record.fail(failure)
        return record

    began, before = time.perf_counter(), one.cpu_seconds()
    records = await closed_loop(streams, seconds, call, spread=spread)
    took, after = time.perf_counter() - began, one.cpu_seconds()
    return edge(load, streams, records, took, {kind: after[kind] - before[kind] for kind in before})


def show(kept: Sequence[Edge]) -> None:
    """Print what each run experienced, and what it cost."""
    show_table(
        "over HTTP and directly over gRPC",
        (
            *("what", "load", "streams", "completed", "failed", "requests/s", "tokens/s"),
            *("TTFT p50 ms", "added", "p99", "added", "gap p99", "no stall", "not late", "others"),
        ),
        [_row(one, _other(kept, one)) for one in kept],
    )
    kinds = list(kept[0].cpu)
    show_table(
        "CPU seconds of a million tokens",
        ("what", "load", "streams", *kinds),
        [
            [
                *(one.what, one.load, str(one.streams)),
                *(f"{one.cpu[kind] / max(one.tokens, 1) * 1e6:.0f}" for kind in kinds),
            ]
            for one in kept
        ],
    )
    print(
        f"no stall: share of streams without a gap above {STALL_SECONDS * 1e3:g} ms; "
        f"not late: above {LATE_SECONDS * 1e3:g} ms"
    )


def _other(kept: Sequence[Edge], one: Edge) -> Edge:
    """Return the run over gRPC with the same load."""
    return next(
        each for each in kept if each.what == GRPC and (each.load, each.streams) == (one.load, one.streams)
    )


def _row(one: Edge, direct: Edge) -> list[str]:
    def added(name: str) -> str:
        return "" if one is direct else f"{(getattr(one, name) - getattr(direct, name)) * 1e3:+.1f}"

    return [
        *(one.what, one.load, str(one.streams), str(one.completed), str(one.failed)),
        *(f"{one.completed / one.seconds:.0f}", f"{one.tokens / one.seconds:.0f}"),
        *(milliseconds(one.first_p50), added("first_p50"), milliseconds(one.first_p99), added("first_p99")),
        *(milliseconds(one.gap_p99), f"{one.untouched:.0%}", f"{one.unnoticed:.0%}", f"{one.others:.2f}"),
    ]
