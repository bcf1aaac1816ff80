"""What the engine makes of a model: decode steps of 1, 8 and 32 sequences, against transformers' `generate`.

    python -m benchmarks.engine [--model smollm2-135m-instruct ...] [--dtype bfloat16 float32] [--threads 2]

Greedy, after a prompt of 100 random tokens, in this process; no service is involved. `generate` runs the
same weights as a static batch with sdpa, in the same run. Shown is the median step; "others" is the share of
the CPU that other processes used meanwhile, which should be next to nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from headrace import models
from headrace.worker.engine.gguf_weights import dequantised
from headrace.worker.engine.loading import load_engine
from headrace.worker.engine.seam import Row, SamplingParams, Token
from headrace.worker.engine.torch_engine import TorchEngine

PROMPT, STEPS, SECONDS = 100, 24, 8.0


@dataclass(frozen=True)
class Figures:
    """One cell: the median decode step of so many sequences, in seconds."""

    model: str
    dtype: str
    what: str
    rows: int
    step_seconds: float
    tokens_per_second: float
    others: float


class Busy:
    """The share of all CPU time that went to other processes since this was made."""

    def __init__(self) -> None:
        self._all, self._own = self._now()

    def others(self) -> float:
        """From 0 to 1; 0 where /proc/stat is not there to tell."""
        everything, own = self._now()
        spent = everything - self._all
        return max(0.0, 1 - (own - self._own) / spent) if spent > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float]:
        times = os.times()
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0, 0.0
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:]]
        return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK"), times.user + times.system


def ours(engine: TorchEngine, prompt: list[int], rows: int) -> list[float]:
    """Times of decode steps on our engine."""
    params = SamplingParams(seed=1, max_tokens=10_000, temperature=0.0, ignore_eos=True)
    sequences = [list(prompt) for _ in range(rows)]

    def step(*chosen: Row) -> None:
        for row, token in zip(chosen, engine.step(chosen), strict=True):
            assert isinstance(token, Token)
            sequences[row.slot].append(token.id)

    for slot, ids in enumerate(sequences):
        step(Row(slot, 0, PROMPT, ids, PROMPT, True, params))
    times: list[float] = []
    while len(times) < STEPS and sum(times) < SECONDS:
        began = time.perf_counter()
        step(*(Row(s, len(ids) - 1, len(ids), ids, PROMPT, True, params) for s, ids in enumerate(sequences)))
        times.append(time.perf_counter() - began)
    for slot in range(rows):
        engine.release(slot)
    return times


def theirs(network: Any, prompt: list[int], rows: int) -> list[float]:
    """Times between tokens of transformers' own `generate`."""
    stamps: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return torch.full((rows,), stamps[-1] - stamps[0] > SECONDS)

    with torch.inference_mode():
        network.generate(
            torch.tensor([prompt] * rows),
            attention_mask=torch.ones(rows, PROMPT, dtype=torch.int64),
            max_new_tokens=STEPS + 1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


def measure(model: str, dtype: str, threads: int) -> list[Figures]:
    """Measure one model in one dtype, both ways, one after the other for each number of rows."""
    cache = models.cache_folder()
    path = models.resolve(model, cache)
    folder = path
    if path.suffix == ".gguf":
        folder = dequantised(path, digest=models.file_digest(path), cache=cache, progress=print)
    engine = load_engine(
        path, name=model, cache=cache, tokenizer_fingerprint="", dtype=dtype, threads=threads, progress=print
    )
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    random = torch.Generator().manual_seed(1)
    ids: list[int] = torch.randint(engine.model.vocabulary_size, (PROMPT,), generator=random).tolist()
    kept = []
    for rows in (1, 8, 32):
        for what in ("engine", "generate"):
            busy = Busy()
            times = ours(engine, ids, rows) if what == "engine" else theirs(network, ids, rows)
            step = statistics.median(times)
            kept.append(Figures(model, dtype, what, rows, step, rows / step, busy.others()))
    return kept


def show(kept: list[Figures]) -> None:
    """Print the figures as a table, each beside its baseline."""
    table = Table(title=f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}")
    for heading in ("model", "dtype", "rows", "engine tok/s", "generate tok/s", "ratio", "others"):
        table.add_column(heading, justify="right")
    for mine, baseline in zip(kept[::2], kept[1::2], strict=True):
        table.add_row(
            mine.model,
            mine.dtype,
            str(mine.rows),
            f"{mine.tokens_per_second:.0f}",
            f"{baseline.tokens_per_second:.0f}",
            f"{mine.tokens_per_second / baseline.tokens_per_second:.2f}",
            f"{max(mine.others, baseline.others):.0%}",
        )
    Console().print(table)


def main() -> None:
    """Parse flags, measure, print, and write build/bench-engine.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[models.SMALL, models.LARGE])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    kept: list[Figures] = []
    for model in arguments.model:
        for dtype in arguments.dtype:
            print(f"{model} in {dtype}")
            kept += measure(model, dtype, arguments.threads)
            gc.collect()
    show(kept)
    out = Path("build/bench-engine.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([asdict(run) for run in kept], indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
