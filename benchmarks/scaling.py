"""Measure how the engine scales, and how close it is to the limits of the machine.

    python -m benchmarks.scaling [--model smollm2-135m-instruct ...] [--dtype int8 bfloat16]

steps      decode steps of 1 to 64 sequences, and of 8 sequences with contexts of 128 to 4096 tokens, compared
           with the roofline of this machine, measured in the same run: the time of the products with the
           weights, or of reading weights, keys and values from memory, whichever is longer
prefill    a step that computes a prompt of 512 tokens, compared with the time of its products
profile    the share of time of each part of a step
stall      TTFT of a prompt of 16 tokens, alone and during the prefill of 4000 other tokens
prefix     TTFT in conversations that grow, with the prefix cache and without it
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from benchmarks import machine, roofline
from benchmarks.serving.hosts.headrace_engine import load, sequence, start
from benchmarks.stepping import row
from headrace import models
from headrace.worker.engine.cpu.kernels.matmul import ElementType
from headrace.worker.engine.load.gguf.weights import dequantised
from headrace.worker.runner import StepReport
from headrace.worker.settings import Settings

ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 1024, 2048, 4096)
CONTEXT_ROWS = 8
STEPS, SECONDS = 24, 4.0
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def decode_seconds(engine: Any, rows: int, context: int) -> float:
    """Measure the median time of a decode step of *rows* sequences with *context* tokens each.

    The content of KV memory is arbitrary: the time does not depend on it.
    """
    ids = [1 + number % 1000 for number in range(context)]
    room = context
    step = [row(engine.model, number, context - 1, ids, room=room) for number in range(rows)]
    engine.step(step)
    times: list[float] = []
    while len(times) < STEPS and sum(times) < SECONDS:
        began = time.perf_counter()
        engine.step(step)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def steps(
    engine: Any, dtype: str, shapes: roofline.Shapes, bandwidth: float, rate: float
) -> list[dict[str, float]]:
    """Measure decode steps, and compute their limits."""
    cells = [(rows, 128) for rows in ROWS if rows <= engine.model.max_running]
    cells += [(CONTEXT_ROWS, context) for context in CONTEXTS[1:] if context <= engine.model.context_length]
    kept = []
    for rows, context in cells:
        seconds = decode_seconds(engine, rows, context)
        # Keys and values have 16 bits where weights have 8.
        cached = rows * context * shapes.kv_values * max(BYTES[dtype], 2)
        memory = (shapes.weights * BYTES[dtype] + cached) / bandwidth
        products = rows * (shapes.weights + context * shapes.kv_values * shapes.group) / rate
        limit = max(products, memory)
        kept.append(
            {
                **{"rows": rows, "context": context, "step_ms": seconds * 1e3},
                **{"tokens_per_s": rows / seconds, "products_ms": products * 1e3},
                **{"memory_ms": memory * 1e3, "of_limit": limit / seconds},
            }
        )
    return kept


def prefill(engine: Any, shapes: roofline.Shapes, rate: float, tokens: int = 512) -> dict[str, float]:
    """Measure the median time of a step that computes a prompt, and the time that its products need."""
    ids = [1 + number % 1000 for number in range(tokens)]
    step = [row(engine.model, 0, 0, ids, room=tokens)]
    engine.step(step)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        engine.step(step)
        times.append(time.perf_counter() - began)
    outputs, inputs = shapes.layers[-1]  # the head, which computes one row
    products = tokens * (shapes.weights - outputs * inputs + tokens / 2 * shapes.kv_values * shapes.group)
    seconds, limit = statistics.median(times), (products + outputs * inputs) / rate
    return {
        "tokens": tokens,
        "step_ms": seconds * 1e3,
        "products_ms": limit * 1e3,
        "of_limit": limit / seconds,
    }


def profile(engine: Any, rows: int, context: int = 128, count: int = 8) -> dict[str, float]:
    """Return the share of time of each part of a decode step."""
    ids = [1] * context
    step = [row(engine.model, number, context - 1, ids, room=context) for number in range(rows)]
    engine.step(step)
    seen = [engine.profile(step) for _ in range(count)]
    return {part: statistics.median(shares[part] for shares in seen) for part in seen[0]}


class Clock:
    """Receives step reports, and records each sequence's first token, its answer and its end."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self.first: dict[int, float] = {}
        self.answers: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.steps = 0

    def on_report(self, report: StepReport[int]) -> None:
        """Record a step's report; called on the engine's thread."""
        now = time.perf_counter()
        with self._news:
            self.steps += report.rows > 0
            for update in report.updates:
                if update.token_ids:
                    self.first.setdefault(update.key, now)
                    self.answers.setdefault(update.key, []).extend(update.token_ids)
                if update.finish is not None:
                    self.ended.add(update.key)
            self._news.notify_all()

    def wait(self, *keys: int) -> None:
        """Wait until these sequences have ended."""
        with self._news:
            self._news.wait_for(lambda: all(key in self.ended for key in keys), timeout=600)

    def wait_steps(self, count: int) -> None:
        """Wait until so many steps were computed."""
        with self._news:
            self._news.wait_for(lambda: self.steps >= count, timeout=600)


def stall(engine: Any, long: int = 4000, short: int = 16, tries: int = 2) -> dict[str, float]:
    """Measure the TTFT of a short prompt, alone and during the prefill of a long one."""
    vocabulary = engine.model.vocabulary_size - 2  # the echo engine's last ids are special
    long = min(long, engine.model.context_length - 2)
    times: dict[str, list[float]] = {"alone": [], "beside": [], "long": []}
    clock = Clock()
    loop = start(engine, clock.on_report)
    key = 0
    for turn in range(tries + 1):
        for what in ("alone", "beside"):
            ids = [(turn * 7919 + key * 31 + number * 13) % vocabulary for number in range(long)]
            key += 2
            if what == "beside":
                began = time.perf_counter()
                already = clock.steps
                loop.submit(sequence(key, ids, 1))
                clock.wait_steps(already + 1)
            sent = time.perf_counter()
            loop.submit(sequence(key + 1, ids[::-1][:short], 8))
            clock.wait(key + 1)
            if turn:  # the first turn warms up
                times[what].append(clock.first[key + 1] - sent)
            if what == "beside":
                clock.wait(key)
                if turn:
                    times["long"].append(clock.first[key] - began)
    loop.stop()
    return {f"{what}_ms": statistics.median(values) * 1e3 for what, values in times.items()}


def conversations(
    engine: Any, *, prefix_cache: bool, chats: int = 4, turns: int = 4, system: int = 400, said: int = 40
) -> dict[str, float]:
    """Run *chats* concurrent conversations of *turns* turns, which share a system prompt."""
    vocabulary = engine.model.vocabulary_size - 2  # the echo engine's last ids are special
    clock, ttft = Clock(), []
    loop = start(engine, clock.on_report, prefix_cache=prefix_cache)
    histories = [[(7 * number) % vocabulary for number in range(system)] for _ in range(chats)]
    began = time.perf_counter()
    for turn in range(turns):
        sent = {}
        for chat, history in enumerate(histories):
            history += [(1000 * chat + 100 * turn + 3 * number) % vocabulary for number in range(said)]
            sent[turn * chats + chat] = time.perf_counter()
            loop.submit(sequence(turn * chats + chat, history, 24))
        clock.wait(*sent)
        ttft += [clock.first[key] - at for key, at in sent.items()]
        for chat, history in enumerate(histories):
            history += clock.answers[turn * chats + chat]
    seconds = time.perf_counter() - began
    loop.stop()
    return {"ttft_p50_ms": statistics.median(ttft) * 1e3, "total_s": seconds}


def measure(model: str, dtype: str, threads: int, bandwidth: float) -> dict[str, Any]:
    """Measure one model in one dtype."""
    cache = models.cache_folder()
    path = models.resolve(model, cache)
    folder = path
    if path.suffix == ".gguf":
        folder = dequantised(path, digest=models.file_digest(path), cache=cache, progress=print)
    shapes = roofline.shapes(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    engine: Any = load(model, dtype, threads, context_length=4224, max_running=max(ROWS))
    window = machine.Window([])
    window.open()
    rate = roofline.multiplications(ElementType[dtype.upper()], threads)
    found: dict[str, Any] = {"model": model, "dtype": dtype, "products_per_s": rate}
    for name, work in (
        ("steps", lambda: steps(engine, dtype, shapes, bandwidth, rate)),
        ("prefill", lambda: prefill(engine, shapes, rate)),
        ("profile", lambda: {rows: profile(engine, rows) for rows in (1, 8, 32)}),
        ("stall", lambda: stall(engine)),
        ("without_cache", lambda: conversations(engine, prefix_cache=False)),
        ("with_cache", lambda: conversations(engine, prefix_cache=True)),
    ):
        print(f"{model} {dtype}: {name.replace('_', ' ')} ...", flush=True)
        found[name] = work()
    window.close()
    return {**found, "others": window.others}


def show(found: dict[str, Any], console: Console) -> None:
    """Print the results of one model in one dtype."""
    quiet = (
        "" if found["others"] <= machine.QUIET else f"; NOT QUIET: others used {found['others']:.2f} cores"
    )
    table = Table(title=f"{found['model']} in {found['dtype']}: decode steps{quiet}")
    for heading in (
        "sequences",
        "context",
        "step ms",
        "tokens/s",
        "products ms",
        "memory ms",
        "of the limit",
    ):
        table.add_column(heading, justify="right")
    for cell in found["steps"]:
        table.add_row(
            *(str(cell["rows"]), str(cell["context"]), f"{cell['step_ms']:.1f}"),
            *(f"{cell['tokens_per_s']:.0f}", f"{cell['products_ms']:.1f}", f"{cell['memory_ms']:.1f}"),
            f"{cell['of_limit']:.0%}",
        )
    console.print(table)
    prompt = found["prefill"]
    console.print(
        f"a prompt of {prompt['tokens']} tokens: {prompt['step_ms']:.0f} ms, "
        f"{prompt['of_limit']:.0%} of the limit"
    )
    for rows, parts in found["profile"].items():
        shares = sorted(parts.items(), key=lambda share: -share[1])
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.01)
        console.print(f"a step of {rows}: {listed}")
    late = found["stall"]
    console.print(
        f"TTFT of 16 tokens: {late['alone_ms']:.0f} ms alone, {late['beside_ms']:.0f} ms during a prefill "
        f"of {late['long_ms']:.0f} ms"
    )
    for name in ("without_cache", "with_cache"):
        if found[name]:
            console.print(
                f"conversations {name.replace('_', ' ')}: TTFT p50 {found[name]['ttft_p50_ms']:.0f} ms, "
                f"total {found[name]['total_s']:.1f} s"
            )


def main() -> None:
    """Parse flags, measure, print, and write build/bench/scaling.json."""
    known: Sequence[str] = get_args(Settings.model_fields["dtype"].annotation)
    usual = [dtype for dtype in ("int8", "bfloat16") if dtype in known]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", default=[models.SMALL, models.LARGE])
    parser.add_argument("--dtype", nargs="+", choices=["int8", "bfloat16", "float32"], default=usual)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bandwidth = roofline.bandwidth()
    console = Console()
    console.print(f"memory bandwidth: {bandwidth / 1e9:.0f} GB/s with {arguments.threads} threads")
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "threads": arguments.threads,
        "memory_bytes_per_s": bandwidth,
        "engines": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for model in arguments.model:
        for dtype in arguments.dtype:
            result["engines"].append(measure(model, dtype, arguments.threads, bandwidth))
            show(result["engines"][-1], console)
            (arguments.out / "scaling.json").write_text(json.dumps(result, indent=1))
            gc.collect()
    print(f"written to {arguments.out / 'scaling.json'}")


if __name__ == "__main__":
    main()
