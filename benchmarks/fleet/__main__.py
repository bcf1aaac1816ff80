"""Measure and compute how a mesh grows.

    python -m benchmarks.fleet PART...

parts:
  costs     run up to a hundred echo workers behind one and two batchers and routers; the CPU time of a
            request, message and token is fitted to them, and written to FILE
  arrivals  requests that arrive at random at busy echo workers, beside the simulation of the same
  growth    simulate a growing load on GPU workers, with the costs in FILE: when to add what
  cards     what GPUs hold and how fast they decode, by arithmetic alone

The column `others` shows the cores that other processes of the machine used: CPU times are those of an
otherwise idle machine only if it is near 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from benchmarks import machine
from benchmarks.fleet import arrivals, cards, costs, growth
from headrace.cli.launch.processes import ChildDied

FILE = Path(__file__).with_name("costs.json")
PARTS = ("costs", "arrivals", "growth", "cards")
MODEL, CARD = cards.MODELS[1], cards.CARDS[1]  # of the part growth


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("parts", nargs="+", choices=PARTS, metavar="PART", help="see above")
    add("--file", type=Path, default=FILE, help="of the costs; default %(default)s")
    add("--seconds", type=float, default=8.0, help="costs, arrivals: length of a run")
    add("--most-workers", type=int, default=100, help="costs: leave out cells with more workers")
    add(
        "--rates", type=float, nargs="+", default=[10, 30, 100, 300, 1000], help="growth: requests per second"
    )
    add("--repeat", type=int, default=1, help="costs: runs of each cell, all of which count for the fit")
    return made


def main() -> None:
    """Parse flags, and run the parts."""
    arguments = parser().parse_args()
    for part in arguments.parts:
        try:
            _run(part, arguments)
        except* ChildDied as group:
            raise SystemExit(f"{part}: {group.exceptions[0]}") from None


def _run(part: str, arguments: argparse.Namespace) -> None:
    if part == "costs":
        cells = [cell for cell in costs.CELLS if cell.workers <= arguments.most_workers]
        kept = asyncio.run(costs.measure(cells, arguments.seconds, arguments.repeat))
        costs.show(kept)
        written = {"machine": machine.describe(), **costs.as_json(kept)}
        arguments.file.write_text(json.dumps(written, indent=1) + "\n")
        print(f"written to {arguments.file}")
    elif part == "arrivals":
        arrivals.show(asyncio.run(arrivals.measure(arguments.seconds)))
    elif part == "growth":
        found = json.loads(arguments.file.read_text())
        router, batcher = (costs.costs_of(found, kind) for kind in costs.SERVICES)
        print(f"{MODEL.name} on {CARD.name}, one worker per card; {growth.Workload()}\n")
        print(growth.markdown(growth.grow(MODEL, CARD, growth.Workload(), arguments.rates, router, batcher)))
    else:
        print(cards.markdown())


if __name__ == "__main__":
    main()
