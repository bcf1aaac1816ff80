"""Measure one workload on Headrace and on other inference servers, its peers, in one run.

64 chat prompts of 32 to 256 tokens, greedy answers of an exact length of 16 to 128 tokens, in a closed loop
of 1 (a quarter of the requests), 8 and 32 clients. Headrace is measured twice: the engine alone, and the
whole mesh over gRPC. Peers run in environments of their own, one at a time, interleaved with Headrace. Runs
during which other processes used the CPU are discarded and repeated.

examples:
  make bench-peers                                   set up all peers, once (half an hour)
  python -m benchmarks.serving                       all systems that are set up, both models
  python -m benchmarks.serving --quick               the same in less time: cells are cut short
  python -m benchmarks.serving --systems headrace openvino vllm --model small --reps 3
  python -m benchmarks.serving --resume              continue an interrupted run
  python -m benchmarks.serving --report              write tables and plot again, measure nothing

systems are headrace (engine and mesh in int8 and bfloat16, and headrace-mesh-lookup:int8),
headrace-engine:DTYPE, headrace-mesh:DTYPE, peers (all), openvino, openvino:int8, openvino:bf16, vllm,
vllm:w8a8, vllm:bf16, llamacpp, transformers:continuous, transformers:static. headrace-mesh-vllm:KIND is the
mesh over the engine of vllm:KIND (w8a8, bf16 or float32), with the same arguments; both also as KIND-eager,
without compilation. headrace-engine-lookup:DTYPE and headrace-mesh-lookup:DTYPE use speculative decoding,
which is off elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks import machine
from benchmarks.serving import registry, report
from benchmarks.serving.campaign import Journal, Plan, campaign
from benchmarks.serving.peers import MODELS, Places, Setup, SetupFailed, default_root
from benchmarks.serving.systems import Place, System
from benchmarks.serving.workload import FILE, load, model_tokenizer


def systems(names: Sequence[str]) -> list[System]:
    """Resolve names, each system once. Raises SystemExit with the known names."""
    try:
        found = [system for name in names for system in registry.find(name)]
    except LookupError as error:
        raise SystemExit(str(error.args[0])) from error
    return list({system.name: system for system in found}.values())


def tokenizer(
    place: Place, chosen: Sequence[System], progress: Callable[[str], None]
) -> Callable[[str], Any]:
    """Return the model's encoder; bytes if only the echo engine is measured."""
    if all(system.name.endswith(":echo") for system in chosen):
        return lambda text: list(text.encode())
    try:
        Setup(place.places, progress).model(place.model, "bf16")
    except SetupFailed as error:
        raise SystemExit(str(error)) from error
    return model_tokenizer(place.places.model(place.model, "bf16"))


def write(out: Path, cells: Sequence[dict[str, Any]], described: dict[str, object]) -> str:
    """Write serving.json, serving.md and serving.png; return the tables."""
    rows = report.summarise(cells)
    plain = [{**row, "figures": {name: asdict(s) for name, s in row["figures"].items()}} for row in rows]
    result = {"machine": described, "summary": plain, "runs": list(cells)}
    (out / "serving.json").write_text(json.dumps(result, indent=1))
    tables = report.markdown(rows)
    (out / "serving.md").write_text(tables)
    caption = f"{described['cpu']}, {described['cores']} cores, {time.strftime('%Y-%m-%d')}"
    if rows and not report.plot(rows, out / "serving.png", caption):
        print("no plot: install matplotlib with pip install 'headrace[bench]'")
    return tables


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--systems", nargs="+", default=["headrace", "peers"], metavar="NAME", help="see above")
    made.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    made.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32], metavar="N")
    made.add_argument("--reps", type=int, default=2, help="repetitions of all cells; default 2")
    made.add_argument("--threads", type=int, default=machine.cores(), help="default: all cores")
    made.add_argument("--out", type=Path, default=Path("build/bench"), metavar="DIR")
    made.add_argument("--peers-root", type=Path, default=default_root(), metavar="DIR")
    made.add_argument("--workload", type=Path, default=FILE, metavar="FILE", help="default: %(default)s")
    made.add_argument(
        "--cell-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="send no new request after S seconds; in-flight ones are completed. Default 0: send all",
    )
    made.add_argument("--quick", action="store_true", help="--cell-seconds 8 --tries 2 --patience 10")
    made.add_argument("--tries", type=int, default=3, help="most runs of a cell; default 3")
    made.add_argument(
        "--patience", type=float, default=30.0, metavar="S", help="seconds to wait for a quiet machine"
    )
    made.add_argument(
        "--leave-below",
        type=float,
        default=0.5,
        metavar="F",
        help="measure a peer only once if it is below this fraction of the fastest; default 0.5",
    )
    made.add_argument("--resume", action="store_true", help="keep the cells in DIR and measure the rest")
    made.add_argument("--report", action="store_true", help="write tables and plot of the cells in DIR")
    return made


async def run(arguments: argparse.Namespace) -> None:
    """Measure the selected systems, and write the results."""
    began = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {line}", flush=True)

    out: Path = arguments.out
    chosen = systems(arguments.systems)
    journal = Journal(out / "serving.jsonl", resume=arguments.resume or arguments.report)
    plan = Plan(
        systems=chosen,
        concurrencies=arguments.concurrency,
        repetitions=arguments.reps,
        seconds=8.0 if arguments.quick else arguments.cell_seconds,
        tries=2 if arguments.quick else arguments.tries,
        patience=10.0 if arguments.quick else arguments.patience,
        leave_below=arguments.leave_below,
    )
    described = machine.describe()
    if not arguments.report:
        for model in arguments.model:
            place = Place(model, arguments.threads, out / "logs" / model, Places(arguments.peers_root))
            requests = load(tokenizer(place, chosen, progress), arguments.workload)
            await campaign(plan, place, requests, journal, progress)
    tables = write(out, journal.cells, described)
    Console(width=180).print(Markdown(tables)) if sys.stdout.isatty() else print(tables)
    print(f"written to {out}: serving.json, serving.md, serving.png; every run is in serving.jsonl")


def main() -> None:
    """Parse flags and run."""
    # On SIGTERM the running system is stopped by leaving its blocks.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(run(parser().parse_args()))
    except KeyboardInterrupt:
        sys.exit("stopped; continue with --resume")


if __name__ == "__main__":
    main()
