"""Measure the latency that one hop and the whole mesh add to a single request at a time.

The engine has no pause between steps. One hop is a call to the batcher, which forwards to its worker; the
whole mesh is a call to the router.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.mesh.answers import Answer, ask
from benchmarks.mesh.engine import engine_alone
from benchmarks.mesh.systems import EngineSpec, in_turn, progress, serving, systems, window
from benchmarks.mesh.tables import show_table
from headrace.cli.bench.latencies import percentile

TOKENS = 16
WARM_UP_CALLS = 20
ENGINE = "engine"


@dataclass(frozen=True)
class Latency:
    """The calls of one system, in seconds; `first` is the time to the first token, `whole` the answer's.

    others   cores that other processes of the machine used during all calls
    """

    what: str
    calls: int
    first_p50: float
    first_p99: float
    whole_p50: float
    whole_p99: float
    others: float


def latency(what: str, answers: Sequence[Answer], *, others: float = 0.0) -> Latency:
    """Summarize calls that were made one after the other."""
    firsts = [answer.first - answer.began for answer in answers]
    wholes = [answer.ended - answer.began for answer in answers]
    return Latency(
        what,
        len(answers),
        percentile(firsts, 50),
        percentile(firsts, 99),
        percentile(wholes, 50),
        percentile(wholes, 99),
        others,
    )


async def measure(arguments: argparse.Namespace) -> list[Latency]:
    """Return the latency of the engine alone, of each batcher and of each router; the calls alternate."""
    engine = EngineSpec(step_seconds=0.0)
    async with serving(systems(arguments.before), engine) as served:
        with engine_alone(engine) as alone:
            call_on: dict[str, Callable[[int], Awaitable[Answer]]] = {
                ENGINE: partial(alone.ask, tokens=TOKENS)
            }
            for name, one in served.items():
                call_on[f"{name}: batcher, one hop"] = partial(ask, one.batcher, tokens=TOKENS)
                call_on[f"{name}: router, whole mesh"] = partial(ask, one.client, tokens=TOKENS)
            progress(f"hops: {arguments.calls} calls of each system, in turn")
            answers: dict[str, list[Answer]] = {name: [] for name in call_on}
            async with window(served, arguments.patience) as measured:
                for number in range(WARM_UP_CALLS + arguments.calls):
                    for name in in_turn(list(call_on), number):
                        answer = await call_on[name](number)
                        if number >= WARM_UP_CALLS:
                            answers[name].append(answer)
    return [latency(name, each, others=measured.others) for name, each in answers.items()]


def show(kept: Sequence[Latency]) -> None:
    """Print the latencies and what each adds to the engine's."""
    alone = kept[0]
    rows = []
    for one in kept:
        row = [one.what, str(one.calls)]
        for name in ("first_p50", "first_p99", "whole_p50", "whole_p99"):
            seconds = getattr(one, name)
            added = f"{(seconds - getattr(alone, name)) * 1e3:+.2f}" if one is not alone else ""
            row += [f"{seconds * 1e3:.2f}", added]
        rows.append([*row, f"{one.others:.2f}"])
    show_table(
        f"one request at a time, answers of {TOKENS} tokens, no pause between steps; ms",
        (
            *("what", "calls", "first token p50", "added", "p99", "added"),
            *("whole answer p50", "added", "p99", "added", "others"),
        ),
        rows,
    )
