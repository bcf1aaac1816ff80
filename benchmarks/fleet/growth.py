"""Compute when a growing load needs more workers, batchers and routers.

The engine is that of a card (see `cards`), the CPU time of router and batcher was measured (see `costs`). The
numbers of processes come from rates alone; the simulation shows the time to the first token with one process
of each kind, and with these numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.fleet import cards
from benchmarks.fleet.simulation import Costs, Engine, Load, Mesh, Outcome, simulate
from benchmarks.gpu.shapes import Shape

BUSY = 0.6  # share of a core that a router or batcher may use, so that bursts do not wait
_SATURATED = 0.98
HEADROOM = 0.85  # share of a worker's capacity that is used


@dataclass(frozen=True)
class Workload:
    """Tokens of a prompt; mean tokens of an answer; seconds per token that answers may take."""

    prompt: int = 512
    answer: int = 256
    pace: float = 0.025

    def load(self, rate: float) -> Load:
        """Return a load of this kind; answers have lengths from half to three halves of the mean."""

        def length(draw: random.Random) -> int:
            return draw.randint(self.answer // 2, 3 * self.answer // 2)

        return Load(rate, self.prompt, length)


def capacity(engine: Engine, workload: Workload) -> float:
    """Return the requests per second at which a worker's steps take just as long as the pace allows.

    Each request occupies the worker for its prompt and for its rows: work = prompt x prompt_token + answer x
    row seconds. What is left of each second goes to the constant part of steps, so a step takes
    step / (1 - rate x work). The sequences that then run must also fit: rate x answer x pace <= slots.
    """
    work = workload.prompt * engine.prompt_token + workload.answer * engine.row
    paced = (1 - engine.step / workload.pace) / work
    return max(0.0, min(paced, engine.slots / (workload.answer * workload.pace)))


@dataclass(frozen=True)
class Need:
    """What a rate of requests needs.

    messages                      per second, from workers to batchers that have workers of their own
    router_cores, batcher_cores   busy cores of all routers, and of all batchers
    """

    rate: float
    workers: int
    batchers: int
    routers: int
    messages: float
    tokens: float
    router_cores: float
    batcher_cores: float


def need(rate: float, engine: Engine, workload: Workload, router: Costs, batcher: Costs) -> Need:
    """Return the numbers of processes for a rate of requests per second."""
    each = HEADROOM * capacity(engine, workload)
    workers = max(1, math.ceil(rate / each))
    work = workload.prompt * engine.prompt_token + workload.answer * engine.row
    step = engine.step / max(1e-9, 1 - rate / workers * work)
    tokens = rate * workload.answer
    # A worker without sequences sends nothing; one with fewer than a token per step sends that.
    messages = min(workers / step, tokens)
    routed, batched = (costs.cores(rate, messages, tokens) for costs in (router, batcher))
    batchers = min(workers, math.ceil(batched / BUSY))
    return Need(rate, workers, batchers, math.ceil(routed / BUSY), messages, tokens, routed, batched)


def grow(
    shape: Shape, card: cards.Card, workload: Workload, rates: Sequence[float], router: Costs, batcher: Costs
) -> list[tuple[Need, Outcome, Outcome]]:
    """Return what each rate needs, simulated with one router and batcher, and with the computed numbers."""
    engine = cards.engine(shape, card, context=workload.prompt + workload.answer // 2)
    found = []
    for rate in rates:
        needed = need(rate, engine, workload, router, batcher)
        one = Mesh(workers=needed.workers, engine=engine, router=router, batcher=batcher)
        several = replace(one, routers=needed.routers, batchers=needed.batchers, divided=True)
        # As long as needed for a thousand requests, after the time in which the workers fill.
        seconds, warm_up = min(60.0, max(4.0, 1000 / rate)), 1.5 * workload.answer * workload.pace
        outcomes = [
            simulate(mesh, workload.load(rate), seconds=seconds, warm_up=warm_up) for mesh in (one, several)
        ]
        found.append((needed, outcomes[0], outcomes[1]))
    return found


def markdown(found: Sequence[tuple[Need, Outcome, Outcome]]) -> str:
    """Return the table of the guide to scaling."""
    lines = [
        "| requests/s | tokens/s | workers | messages/s | cores: routers, batchers | routers, batchers "
        "| TTFT p50 / p99, ms: one of each | so many | TPOT p50, ms: one of each | so many |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for needed, one, several in found:
        cells = (
            *(f"{needed.rate:g}", f"{needed.tokens:,.0f}", str(needed.workers), f"{needed.messages:,.0f}"),
            f"{needed.router_cores:.2f}, {needed.batcher_cores:.2f}",
            f"{needed.routers}, {needed.batchers}",
            *(_ttft(each) for each in (one, several)),
            *(f"{each.tpot(50) * 1e3:.0f}" if not _saturated(each) else "-" for each in (one, several)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _saturated(outcome: Outcome) -> bool:
    return max(outcome.router_busy, outcome.batcher_busy) > _SATURATED


def _ttft(outcome: Outcome) -> str:
    if _saturated(outcome):
        return "saturated"
    return f"{outcome.ttft(50) * 1e3:,.0f} / {outcome.ttft(99) * 1e3:,.0f}"
