"""Show results: a table in the words of `vllm bench serve`, a bar while it runs, and JSON."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from headrace.cli.answers import printable
from headrace.cli.bench.figures import BUSY_SHARE, LATENCIES, QUEUE, word
from headrace.cli.calls.amounts import money

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from headrace.cli.bench.load import Run
    from headrace.cli.bench.objectives import Objective
    from headrace.cli.bench.options import Load

_TITLES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2el": "E2EL",
    QUEUE: "Client queue",
}
_UPDATE_SECONDS = 0.25


@asynccontextmanager
async def progress(run: Run, load: Load, console: Console) -> AsyncGenerator[None, None]:
    """Show how far *run* is while the block runs; nothing if *console* is not a terminal."""
    if not console.is_terminal:
        yield
        return
    by_time = load.requests is None
    columns = (
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=load.seconds if by_time else load.requests)
        watcher = asyncio.create_task(_watch(run, bar, task, by_time=by_time))
        try:
            yield
        finally:
            watcher.cancel()


async def _watch(run: Run, bar: Progress, task: Any, *, by_time: bool) -> None:
    before, at = 0, time.perf_counter()
    rate = 0.0
    while True:
        tokens, now = run.tokens_so_far(), time.perf_counter()
        if now > at:
            rate = max(tokens - before, 0) / (now - at)
        before, at = tokens, now
        ended = run.completed + run.failed
        text = f"{ended} requests, {len(run.active)} in flight, {rate:,.0f} tok/s"
        if run.failed:
            text += f", {run.failed} failed"
        bar.update(
            task,
            completed=now - run.began if by_time and run.began else ended,
            description=text,
            refresh=True,
        )
        await asyncio.sleep(_UPDATE_SECONDS)


def show(result: Mapping[str, Any], percents: Sequence[float], console: Console) -> None:
    """Print one result."""
    console.print(_summary(result))
    console.print(_latencies(result, percents))
    if "headrace" in result:
        console.print(_tiers(result["headrace"]))
    for line in notes(result):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _summary(result: Mapping[str, Any]) -> Table:
    table = Table(
        box=None, show_header=False, title="Serving benchmark result", title_justify="left", pad_edge=False
    )
    table.add_column()
    table.add_column(justify="right")
    for name, value in _lines(result):
        table.add_row(name, value)
    return table


def _lines(result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "Successful requests:", f"{result['completed']}"
    yield "Failed requests:", f"{result['failed']}"
    for kind, count in result["errors_by_kind"].items():
        yield f"  {printable(kind)}:", f"{count}"
    if result["unfinished"]:
        yield "Unfinished requests:", f"{result['unfinished']}"
    if result["max_concurrency"] is not None:
        yield "Maximum request concurrency:", f"{result['max_concurrency']}"
    if result["request_rate"] != "inf":
        yield "Request rate configured (RPS):", f"{result['request_rate']:.2f}"
    yield "Benchmark duration (s):", f"{result['duration']:.2f}"
    yield "Total input tokens:", _number(result["total_input_tokens"], "d", "not reported")
    yield "Total generated tokens:", f"{result['total_output_tokens']}"
    yield "Request throughput (req/s):", f"{result['request_throughput']:.2f}"
    if result["request_goodput"] is not None:
        yield "Request goodput (req/s):", f"{result['request_goodput']:.2f}"
        yield "Share of good requests:", _number(result["goodput_share"], ".1%")
    yield "Output token throughput (tok/s):", f"{result['output_throughput']:.2f}"
    yield "Peak output token throughput (tok/s):", f"{result['max_output_tokens_per_s']:.2f}"
    yield "Peak concurrent requests:", f"{result['max_concurrent_requests']}"
    yield "Total token throughput (tok/s):", _number(result["total_token_throughput"], ".2f", "not reported")


def _latencies(result: Mapping[str, Any], percents: Sequence[float]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("ms", no_wrap=True)
    # P50 is the median.
    kinds = ["mean", "median", "std", *(f"p{word(percent)}" for percent in percents if percent != 50)]
    for kind in kinds:
        table.add_column(kind.replace("p", "P", 1) if kind[1:2].isdigit() else kind.title(), justify="right")
    for name in (*LATENCIES, QUEUE):
        if f"mean_{name}_ms" in result:
            table.add_row(_TITLES[name], *(_number(result[f"{kind}_{name}_ms"], ".2f") for kind in kinds))
    return table


def _tiers(ours: Mapping[str, Any]) -> Table:
    caption = [f"{ours['cached_tokens']} cached input tokens"]
    if ours["cost"] is not None:
        caption.append(f"cost {money(ours['cost'])}")
    if ours["largest_tier_cost"] is not None:
        caption.append(f"on the largest tier alone {money(ours['largest_tier_cost'])}")
    moves = sum(ours["failovers"].values())
    caption.append(
        f"{moves} failovers"
        + (
            f" ({', '.join(f'{printable(reason)} {n}' for reason, n in ours['failovers'].items())})"
            if moves
            else ""
        )
    )
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=" · ".join(caption),
        caption_justify="left",
    )
    table.add_column("tier")
    for heading in ("requests", "share", "generated", "median TTFT", "median TPOT", "cost"):
        table.add_column(heading, justify="right")
    for tier, own in ours["tiers"].items():
        table.add_row(
            printable(tier),
            f"{own['requests']}",
            f"{own['share']:.1%}",
            f"{own['output_tokens']}",
            _number(own["median_ttft_ms"], ".2f"),
            _number(own["median_tpot_ms"], ".2f"),
            "" if own["cost"] is None else money(own["cost"]),
        )
    return table


def notes(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know about the figures."""
    found = []
    busy = result["generator"]
    if busy["bottleneck"]:
        late = (
            busy["lag_p99_ms"]
            if busy["late_p99_ms"] is None
            else max(busy["lag_p99_ms"], busy["late_p99_ms"])
        )
        cause = (
            "reduce the load, or share it between several processes"
            if busy["cpu_share"] > BUSY_SHARE
            else "other processes use this machine's cores; run it on another machine"
        )
        found.append(
            f"the load generator distorts the latencies: it ran {late:.1f} ms late (P99) and used "
            f"{busy['cpu_share']:.0%} of a core; {cause}"
        )
    if result["output_tokens_from"] != "server" and result["completed"]:
        found.append(
            "the server did not report the tokens of all answers; where it did not, each message with text "
            "counts as one token"
        )
    if 0 < result["completed"] < 100:
        found.append(
            f"only {result['completed']} requests were completed: P99 shows little but the slowest one"
        )
    return found


def show_sweep(
    results: Sequence[Mapping[str, Any]], objectives: Sequence[Objective], console: Console
) -> None:
    """Print several results, one in a row."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    by_rate = results[0]["request_rate"] != "inf"
    headings = ["rate" if by_rate else "concurrency", "req/s", "tok/s", "failed", "TTFT P50", "TTFT P99"]
    headings += ["TPOT P50", "TPOT P99", "E2EL P99", *(["met"] if objectives else [])]
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for result in results:
        latencies = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "p99_e2el_ms")
        cells = [
            f"{result['request_rate']:g}" if by_rate else f"{result['max_concurrency']}",
            f"{result['request_throughput']:.2f}",
            f"{result['output_throughput']:.1f}",
            f"{result['failed']}",
            *(_number(result.get(name), ".1f") for name in latencies),
        ]
        if objectives:
            cells.append("yes" if all(one.met(result) for one in objectives) else "no")
        table.add_row(*cells)
    console.print(table)


def show_objectives(result: Mapping[str, Any], objectives: Sequence[Objective], console: Console) -> None:
    """Print whether a result meets each objective."""
    for one in objectives:
        met = one.met(result)
        console.print(
            f"{'pass' if met else 'fail'}: {one} ({_number(result.get(one.name), '.4g', 'no value')})",
            style="green" if met else "red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def write_json(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one result as an object, several as a list. Raises OSError."""
    written = results[0] if len(results) == 1 else results
    path.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else format(value, form)
