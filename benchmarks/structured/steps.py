"""Measure the time of an output token with and without a grammar, in turns of one run.

All sequences of a turn run at the same time and have the same number of tokens. The grammar is that of a long
list of records. The time of a token is that between a sequence's first token and its last. It differs between
turns by more than a grammar adds, so the time of sampling is given, too: masks are computed within it.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import machine
from benchmarks.serving.hosts.headrace_engine import load, start
from benchmarks.structured.models import words_of
from headrace.grammars.forms import json_schema_grammar
from headrace.worker.engine.interface import Fault, Row, Token
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.engine.sampling import Sampler
from headrace.worker.engine.torch_engine import TorchEngine
from headrace.worker.runner import SamplingParams, SequenceSpec, StepReport

ROWS = (1, 8, 32)
TOKENS = 64
TURNS = 7  # with and without, each
_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "role": {"enum": ["admin", "editor", "viewer"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
    },
    "required": ["name", "age", "role", "tags"],
    "additionalProperties": False,
}
GRAMMAR = json_schema_grammar(json.dumps({"type": "array", "items": _RECORD, "minItems": 100})).text
_PROMPT = "A list of people, as JSON:"


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Return the milliseconds of a token by model, number of rows, and with or without a grammar."""
    found: dict[str, Any] = {}
    for model in models:
        ids = list(words_of(model).encode(_PROMPT))
        engine = load(model, "auto", machine.cores(), context_length=512, max_running=max(ROWS))
        turns = _Turns()
        assert isinstance(engine, TorchEngine)
        turns.watch(engine._sampler)
        loop = start(engine, turns.report)
        with Progress() as progress:
            bar = progress.add_task(model, total=len(ROWS) * (TURNS + 1) * 2)
            for rows in ROWS:
                spent: dict[str, list[tuple[float, float]]] = {"": [], GRAMMAR: []}
                for turn in range(TURNS + 1):
                    for grammar, figures in spent.items():
                        seconds = turns.run(loop, ids, rows, grammar)
                        progress.advance(bar)
                        if turn:  # the first one warms up
                            figures.append(seconds)
                found.setdefault(model, {})[str(rows)] = {
                    "without": _spreads(spent[""]),
                    "with": _spreads(spent[GRAMMAR]),
                }
        loop.stop()
    return found


class _Turns:
    """Runs sequences at the same time, and waits for their ends."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._left = 0
        self._seconds: list[float] = []
        self._sampling: list[float] = []

    def watch(self, sampler: Sampler) -> None:
        """Time each call of a sampler from now on."""
        sample = sampler.sample

        def timed(logits: torch.Tensor, rows: Sequence[Row]) -> list[Token | Fault]:
            started = time.perf_counter()
            tokens = sample(logits, rows)
            self._sampling.append(time.perf_counter() - started)
            return tokens

        sampler.sample = timed  # type: ignore[method-assign]

    def report(self, report: StepReport[int]) -> None:
        """Record the ends of sequences."""
        for update in report.updates:
            if update.finish is None:
                continue
            times = update.times
            if times.first_token is None or times.last_token is None or update.fault:
                raise RuntimeError(f"a sequence ended without tokens: {update.fault}")
            self._seconds.append((times.last_token - times.first_token) / (TOKENS - 1))
            self._left -= 1
            if not self._left:
                self._ended.set()

    def run(self, loop: EngineLoop[int], ids: Sequence[int], rows: int, grammar: str) -> tuple[float, float]:
        """Return the mean time of a token, and that of a step's sampling, in seconds."""
        self._ended.clear()
        self._left, self._seconds, self._sampling = rows, [], []
        now = time.monotonic()
        loop.submit(
            *(
                SequenceSpec(
                    key,
                    list(ids),
                    len(ids),
                    SamplingParams(
                        seed=key, max_tokens=TOKENS, temperature=1.0, ignore_eos=not grammar, grammar=grammar
                    ),
                    submitted=now,
                )
                for key in range(rows)
            )
        )
        self._ended.wait()
        return statistics.fmean(self._seconds), statistics.fmean(self._sampling)


def _spreads(figures: Sequence[tuple[float, float]]) -> dict[str, dict[str, float]]:
    tokens, sampling = zip(*figures, strict=True)
    return {"token": _spread(tokens), "sampling": _spread(sampling)}


def _spread(figures: Sequence[float]) -> dict[str, float]:
    return {
        "median_ms": round(statistics.median(figures) * 1e3, 3),
        "min_ms": round(min(figures) * 1e3, 3),
        "max_ms": round(max(figures) * 1e3, 3),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the figures as a table in Markdown."""
    yield "| model | rows | ms per token, without | with a grammar | more | sampling, without | with | more |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for model, by_rows in found.items():
        for rows, each in by_rows.items():
            plain, bound = (each[way]["token"]["median_ms"] for way in ("without", "with"))
            short, long = (each[way]["sampling"]["median_ms"] for way in ("without", "with"))
            yield (
                f"| {model} | {rows} | {plain:.1f} | {bound:.1f} | {bound / plain - 1:+.1%} "
                f"| {short:.2f} | {long:.2f} | {(long - short) / plain:+.1%} of a token |"
            )
