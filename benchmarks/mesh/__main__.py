"""Measure what the mesh costs: an echo engine behind all three services, against the engine alone.

    python -m benchmarks.mesh [--parts PART...] [--before CHECKOUT]

parts:
  rates    token rate, TTFT, TPOT and gaps of streams that start at the same time
  cpu      CPU time of a request in each process
  hops     latency that one hop and the whole mesh add to one request at a time
  paced    streams of a steady pace that the mesh carries without a stall
  gateway  latency, CPU time and gaps over HTTP, through the gateway, beside gRPC
  memory   memory of each process, idle and with many open streams
  stages   where the time to the first token of one request goes
  profile  functions of each service by own time, in build/bench-mesh-profile; samples with py-spy if it is
           on PATH, else with cProfile, which slows the services

With --before, the services of another checkout are measured in turn with this checkout's, except by `stages`
and `profile`. The client is always this checkout's. Every answer is checked against its prompt. The column
`others` shows the cores that other processes of the machine used: a run in which it is not near 0 is not
valid, and is shown only if there is no other one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import machine
from benchmarks.mesh import cpu, gateway, hops, memory, paced, profiles, rates, stages
from benchmarks.mesh.answers import WrongAnswer
from benchmarks.mesh.stages import NoSuchProbe
from headrace.cli.launch.processes import ChildDied
from headrace.cli.launch.tiers import BadSpec
from headrace.errors import HeadraceError

# Each has `measure`, which returns its figures, and `show`, which prints them.
PARTS: dict[str, ModuleType] = {
    "rates": rates,
    "cpu": cpu,
    "hops": hops,
    "paced": paced,
    "gateway": gateway,
    "memory": memory,
    "stages": stages,
    "profile": profiles,
}
DEFAULT_PARTS = ("rates", "cpu", "hops", "paced", "gateway", "memory")
PACED = [16, 32, 64, 128, 256, 512, 1024]
OUT = Path("build/bench-mesh.json")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.mesh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--parts", nargs="+", choices=PARTS, default=DEFAULT_PARTS, metavar="PART", help="what to measure")
    add("--before", type=Path, help="another checkout, whose services are also measured")
    add(
        "--repeat", type=int, default=3, help="runs of each system (rates, cpu, gateway); the median is shown"
    )
    add("--patience", type=float, default=10.0, help="seconds to wait for a quiet machine before each run")
    add("--seconds", type=float, default=6.0, help="length of a run (cpu, paced, gateway, profile)")
    add("--streams", type=int, nargs="+", default=[1, 8, 64, 256], help="rates: streams at once")
    add("--tokens", type=int, default=256, help="rates: tokens per answer")
    add("--step-seconds", type=float, nargs="+", default=[0.01, 0.0], help="rates: times of an engine step")
    add("--step-tokens", type=int, default=128, help="rates: most tokens of a step of the engine")
    add("--callers", type=int, default=16, help="cpu: callers, each of which makes one call after the other")
    add("--calls", type=int, default=500, help="hops: calls of each system")
    add("--paced", type=int, nargs="+", default=PACED, help="paced: concurrent streams")
    add("--edge-streams", type=int, default=256, help="gateway: streams of a steady pace")
    add("--flush-tokens", type=int, default=1, help="paced: tokens per message; 0 for the mesh's own policy")
    add("--open-streams", type=int, default=1024, help="memory: open streams")
    add("--requests", type=int, default=100, help="stages: requests")
    return made


def as_json(kept: Sequence[Any]) -> list[Any]:
    """Return the figures of one part as values of JSON."""
    return [asdict(one) if is_dataclass(one) and not isinstance(one, type) else one for one in kept]


def main() -> None:
    """Parse flags, measure each part, print it, and write build/bench-mesh.json."""
    arguments = parser().parse_args()
    print(f"{machine.cores()} cores, {platform.machine()}, Python {platform.python_version()}")
    written: dict[str, Any] = {"machine": machine.describe()}
    OUT.parent.mkdir(exist_ok=True)
    for name in dict.fromkeys(arguments.parts):
        try:
            kept = asyncio.run(PARTS[name].measure(arguments))
        except (BadSpec, ChildDied, HeadraceError, NoSuchProbe, WrongAnswer) as error:
            raise SystemExit(f"{name}: {error}") from None
        PARTS[name].show(kept)
        written[name] = as_json(kept)
        OUT.write_text(json.dumps(written, indent=1))  # after each part: a later one may fail
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
