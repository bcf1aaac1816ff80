"""Measure how many streams of a steady pace the mesh carries without a stall.

Each caller makes one call after the other; their first calls are spread over the length of an answer, so that
streams begin and end all the time, as in operation. A stream is touched by a stall if two of its messages
are more than two steps apart, or if it fails. The engine's own work comes on top of its step time, so with
many streams even the engine alone does not keep the pace: its rows show where that begins. A single pause of
a busy machine touches all streams.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.mesh.answers import Answer, ask, closed_loop
from benchmarks.mesh.engine import engine_alone
from benchmarks.mesh.rates import ENGINE, max_running
from benchmarks.mesh.systems import EngineSpec, in_turn, progress, serving, systems, window
from benchmarks.mesh.tables import milliseconds, show_table
from headrace import errors
from headrace.cli.bench.latencies import percentile
from headrace.client import Client

TOKENS, STEP_SECONDS = 64, 0.02
STALL_SECONDS = 2 * STEP_SECONDS
ANSWER_SECONDS = TOKENS * STEP_SECONDS
ENOUGH = 0.99  # share of untouched streams, to carry a number of streams


@dataclass(frozen=True)
class Pace:
    """One number of concurrent streams.

    completed   streams that were run, failed ones included
    untouched   share of streams without a stall
    gap_p99     between messages of a stream, in seconds
    others      cores that other processes of the machine used during the run
    """

    what: str
    streams: int
    completed: int
    failed: int
    untouched: float
    gap_p99: float
    others: float


def pace(what: str, streams: int, answers: Sequence[Answer | None], *, others: float = 0.0) -> Pace:
    """Summarize the streams of one run; None is a stream that failed."""
    whole = [answer for answer in answers if answer is not None]
    untouched = sum(max(answer.gaps, default=0.0) <= STALL_SECONDS for answer in whole)
    gaps = [gap for answer in whole for gap in answer.gaps]
    return Pace(
        what,
        streams,
        len(answers),
        len(answers) - len(whole),
        untouched / len(answers),
        percentile(gaps, 99) if gaps else 0.0,
        others,
    )


def carried(paces: Sequence[Pace]) -> int:
    """Return the largest number of streams up to which enough were untouched; 0 if there is none."""
    most = 0
    for one in sorted(paces, key=lambda one: one.streams):
        if one.untouched < ENOUGH:
            break
        most = one.streams
    return most


async def measure(arguments: argparse.Namespace) -> list[Pace]:
    """Return the share of untouched streams of each system, for rising numbers of streams."""
    kept: list[Pace] = []
    running = max_running(max(arguments.paced))
    engine = EngineSpec(STEP_SECONDS, max_running=running, step_tokens=2 * running)
    async with serving(systems(arguments.before), engine) as served:
        with engine_alone(engine) as alone:
            call_on: dict[str, Callable[[int], Awaitable[Answer | None]]] = {
                ENGINE: partial(alone.ask, tokens=TOKENS),
                **{name: partial(_ask, one.client, arguments.flush_tokens) for name, one in served.items()},
            }
            for position, streams in enumerate(sorted(arguments.paced)):
                for name in in_turn(list(call_on), position):
                    async with window(served, arguments.patience) as measured:
                        answers = await closed_loop(
                            streams, arguments.seconds, call_on[name], spread=ANSWER_SECONDS
                        )
                    kept.append(pace(name, streams, answers, others=measured.others))
                    progress(f"paced: {streams} streams, {name}: {kept[-1].untouched:.1%} untouched")
    return kept


async def _ask(client: Client, flush_tokens: int, number: int) -> Answer | None:
    try:
        return await ask(client, number, TOKENS, flush_tokens=flush_tokens)
    except errors.HeadraceError:
        return None


def show(kept: Sequence[Pace]) -> None:
    """Print the shares, and the largest number of streams that each system carries."""
    names = dict.fromkeys(one.what for one in kept)
    show_table(
        f"streams of {TOKENS} tokens at {STEP_SECONDS * 1e3:g} ms, without a gap above "
        f"{STALL_SECONDS * 1e3:g} ms",
        ("what", "streams", "completed", "failed", "untouched", "gap p99 ms", "others"),
        [
            [
                one.what,
                str(one.streams),
                str(one.completed),
                str(one.failed),
                f"{one.untouched:.1%}",
                milliseconds(one.gap_p99),
                f"{one.others:.2f}",
            ]
            for name in names
            for one in kept
            if one.what == name
        ],
    )
    for name in names:
        most = carried([one for one in kept if one.what == name])
        print(f"{name} carries {most} streams with at least {ENOUGH:.0%} untouched")
