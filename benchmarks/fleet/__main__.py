"""Measure and compute how a mesh grows.

    python -m benchmarks.fleet PART...

parts:
  costs     run up to a hundred echo workers behind one and two batchers and routers; the CPU time of a
            request, message and token is fitted to them, and written to FILE
  arrivals  requests that arrive at random at busy echo workers, beside the simulation of the same
  growth    simulate a growing load on GPU workers, with the costs in FILE: when to add what
  cards     what GPUs hold and how fast they decode, by arithmetic alone

With --write docs/scaling.md, the tables there are replaced.

The column `others` shows the cores that other processes of the machine used: CPU times are those of an
otherwise idle machine only if it is near 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
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
    add("--write", type=Path, metavar="PAGE", help="also replace the tables of a page")
    add("--report", action="store_true", help="costs: measure nothing, read FILE")
    add("--file", type=Path, default=FILE, help="of the costs; default %(default)s")
    add("--seconds", type=float, default=8.0, help="costs, arrivals: length of a run")
    add("--most-workers", type=int, default=100, help="costs: leave out cells with more workers")
    add(
        "--rates", type=float, nargs="+", default=[10, 30, 100, 300, 1000], help="growth: requests per second"
    )
    add("--repeat", type=int, default=1, help="costs: runs of each cell, all of which count for the fit")
    return made


def main() -> None:
    """Parse flags, run the parts, and print their tables."""
    arguments = parser().parse_args()
    for part in arguments.parts:
        try:
            tables = _run(part, arguments)
        except* ChildDied as group:
            raise SystemExit(f"{part}: {group.exceptions[0]}") from None
        for name, table in tables.items():
            print(f"{name}:\n\n{table}", flush=True)
            if arguments.write:
                page = replaced(arguments.write.read_text(), name, table)
                arguments.write.write_text(page)


def replaced(page: str, name: str, table: str) -> str:
    """Return a page with another table after the comment ``<!-- NAME -->``, up to ``<!-- end -->``.

    Raises ValueError if the page has no such comment.
    """
    before, found, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not found or not end:
        raise ValueError(f"the page has no table {name!r}")
    return f"{before}{found}\n{table}\n{end}{after}"


def _run(part: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Run a part; returns its tables by name."""
    if part == "costs":
        if not arguments.report:
            cells = [cell for cell in costs.CELLS if cell.workers <= arguments.most_workers]
            measured = asyncio.run(costs.measure(cells, arguments.seconds, arguments.repeat))
            about = {"machine": machine.describe(), "date": time.strftime("%Y-%m-%d")}
            arguments.file.write_text(json.dumps({**about, **costs.as_json(measured)}, indent=1) + "\n")
        found = json.loads(arguments.file.read_text())
        kept = costs.cells_of(found)
        described = f"{found['machine']['cpu']}, {found['machine']['cores']} cores, {found['date']}"
        return {"costs": costs.fitted_markdown(kept), "cells": costs.markdown(kept, described)}
    if part == "arrivals":
        return {"arrivals": arrivals.markdown(asyncio.run(arrivals.measure(arguments.seconds)))}
    if part == "growth":
        found = json.loads(arguments.file.read_text())
        router, batcher = (costs.costs_of(found, kind) for kind in costs.SERVICES)
        grown = growth.grow(MODEL, CARD, growth.Workload(), arguments.rates, router, batcher)
        return {"growth": growth.markdown(grown)}
    return {"cards": cards.markdown(), "layouts": cards.layouts_markdown()}


if __name__ == "__main__":
    main()
