"""Measure token rate, time to the first token and evenness of many streams that start at the same time.

Two step times are usual. With 10 ms, as a model would take, the table shows what the mesh adds. With 0 it
shows the token rate at which the mesh saturates.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from benchmarks.mesh.answers import Answer, ask, at_once
from benchmarks.mesh.engine import engine_alone
from benchmarks.mesh.systems import EngineSpec, in_turn, median_run, progress, serving, systems, window
from benchmarks.mesh.tables import milliseconds, show_table
from headrace.cli.bench.latencies import percentile
from headrace.client import Client

ENGINE = "engine"  # the engine alone, among the systems
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Rates:
    """One run. Times in seconds, rates per second.

    ttft        time to the first token of a stream, since all streams started
    tpot        time per further token of a stream
    gap_p99     between messages of a stream
    others      cores that other processes of the machine used during the run
    """

    what: str
    streams: int
    step_seconds: float
    tokens: int
    seconds: float
    tokens_per_second: float
    messages_per_second: float
    ttft_p50: float
    ttft_max: float
    tpot_p50: float
    tpot_p99: float
    gap_p99: float
    others: float


def rates(what: str, step_seconds: float, answers: Sequence[Answer], *, others: float = 0.0) -> Rates:
    """Summarize the streams of one run, which started at the same time."""
    began, ended = min(answer.began for answer in answers), max(answer.ended for answer in answers)
    tokens, seconds = sum(answer.tokens for answer in answers), ended - began
    firsts = [answer.first - began for answer in answers]
    tpots = [answer.tpot for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    return Rates(
        what,
        len(answers),
        step_seconds,
        tokens,
        seconds,
        tokens / seconds,
        sum(answer.messages for answer in answers) / seconds,
        statistics.median(firsts),
        max(firsts),
        statistics.median(tpots),
        percentile(tpots, 99),
        percentile(gaps, 99) if gaps else 0.0,
        others,
    )


def max_running(streams: int) -> int:
    """Return the sequences that an engine must run at a time, for this number of streams."""
    return max(streams, 256)


async def through_mesh(
    client: Client, streams: int, tokens: int, step_seconds: float, what: str = "mesh"
) -> Rates:
    """Run *streams* requests at once through the mesh, once."""
    return rates(what, step_seconds, await at_once(partial(ask, client, tokens=tokens), streams))


async def measure(arguments: argparse.Namespace) -> list[Rates]:
    """Return the median run of each system, for each step time and number of streams."""
    kept: list[Rates] = []
    for step_seconds in arguments.step_seconds:
        # One engine runs as many sequences as its largest number of streams; a smaller one prefills
        # a burst in more steps, so it is a different measurement.
        for running, streams in groupby(sorted(arguments.streams), key=max_running):
            engine = EngineSpec(step_seconds, running, arguments.step_tokens)
            kept += await _measure(arguments, engine, list(streams))
    return kept


async def _measure(arguments: argparse.Namespace, engine: EngineSpec, counts: Iterable[int]) -> list[Rates]:
    kept: list[Rates] = []
    async with serving(systems(arguments.before), engine) as served:
        with engine_alone(engine) as alone:
            call_on: dict[str, Callable[..., Awaitable[Answer]]] = {
                ENGINE: alone.ask,
                **{name: partial(ask, one.client) for name, one in served.items()},
            }
            for streams in counts:
                runs: dict[str, list[Rates]] = {name: [] for name in call_on}
                for repetition in range(arguments.repeat):
                    for name in in_turn(list(call_on), repetition):
                        async with window(served, arguments.patience) as measured:
                            # After the wait for a quiet machine all code is cold, which would be measured.
                            await at_once(partial(call_on[name], tokens=WARM_UP_TOKENS), streams)
                            answers = await at_once(partial(call_on[name], tokens=arguments.tokens), streams)
                        run = rates(name, engine.step_seconds, answers, others=measured.others)
                        runs[name].append(run)
                        progress(
                            f"rates: steps of {engine.step_seconds * 1e3:g} ms, {streams} streams, run "
                            f"{repetition + 1} of {arguments.repeat}, {name}: {run.tokens_per_second:,.0f} "
                            "tokens/s"
                        )
                kept += [median_run(each, lambda run: run.tokens_per_second) for each in runs.values()]
    return kept


def share(run: Rates, alone: Rates) -> float:
    """Return the token rate as a share of that of the engine alone."""
    return run.tokens_per_second / alone.tokens_per_second


def slowest_in_steps(run: Rates, alone: Rates) -> float:
    """Return the time per token of the slowest streams (p99), in steps of the engine alone."""
    return run.tpot_p99 / alone.tpot_p50


def show(kept: Sequence[Rates]) -> None:
    """Print a table for each step time."""
    for step_seconds in dict.fromkeys(run.step_seconds for run in kept):
        runs = [run for run in kept if run.step_seconds == step_seconds]
        alone = {run.streams: run for run in runs if run.what == ENGINE}
        show_table(
            f"streams that start at the same time, steps of {step_seconds * 1e3:g} ms",
            (
                *("streams", "what", "tokens/s", "of engine", "TTFT p50 ms", "added", "TPOT p50 ms"),
                *("p99", "p99 in steps", "gap p99 ms", "messages/s", "others"),
            ),
            [_cells(run, alone) for run in runs],
        )


def _cells(run: Rates, engines: Mapping[int, Rates]) -> list[str]:
    alone = engines[run.streams]
    compared = run is not alone
    return [
        str(run.streams),
        run.what,
        f"{run.tokens_per_second:,.0f}",
        f"{share(run, alone):.2f}" if compared else "",
        milliseconds(run.ttft_p50),
        f"{(run.ttft_p50 - alone.ttft_p50) * 1e3:+.1f}" if compared else "",
        milliseconds(run.tpot_p50),
        milliseconds(run.tpot_p99),
        f"{slowest_in_steps(run, alone):.2f}" if run.step_seconds else "",
        milliseconds(run.gap_p99),
        f"{run.messages_per_second:,.0f}" if compared else "",
        f"{run.others:.2f}",
    ]
