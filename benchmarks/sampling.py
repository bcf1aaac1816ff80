"""Measure how long sampling one token per row takes, by sampling parameters: `python -m benchmarks.sampling`.

Milliseconds of CPU on one thread, for rows of 6,000 ids and a vocabulary of 49,152: for the first step of the
rows, and the median of later steps.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import torch

from headrace.worker.engine.interface import Memo, Row, SamplingParams, Token
from headrace.worker.engine.sampling import Sampler

VOCABULARY, IDS, STEPS = 49_152, 6_000, 12
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, log-probabilities": {"temperature": 0.0, "logprobs": True},
    "temperature 1": {},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 20, top_p 0.95": {"top_k": 20, "top_p": 0.95},
    "greedy, penalties": {
        "temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2,
    },
    "greedy, 300 biases": {"temperature": 0.0, "logit_bias": dict.fromkeys(range(0, 2100, 7), 1.0)},
    "greedy, 64 stop ids, min_tokens": {
        "temperature": 0.0, "min_tokens": 10**6, "stop_ids": frozenset(range(64)),
    },
}  # fmt: skip


def measure(params: dict[str, Any], rows: int) -> list[float]:
    """Return the seconds of each step."""
    dice = random.Random(1)
    logits = 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(frozenset({0}))
    histories = [[dice.randrange(VOCABULARY) for _ in range(IDS)] for _ in range(rows)]
    memos = [Memo() for _ in range(rows)]
    sampling = SamplingParams(seed=1, max_tokens=10**6, **params)
    times = []
    for _ in range(STEPS):
        step = [
            Row([0], len(ids) - 1, len(ids), ids, IDS // 6, True, sampling, memo)
            for ids, memo in zip(histories, memos, strict=True)
        ]
        began = time.thread_time()
        tokens = sampler.sample(logits, step)
        times.append(time.thread_time() - began)
        for ids, token in zip(histories, tokens, strict=True):
            assert isinstance(token, Token), token
            ids.append(token.id)
    return times


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    measure({}, 1)  # loads the kernels
    print("| rows of | rows | first step, ms | later steps, ms |\n|---|---|---|---|")
    for name, params in KINDS.items():
        for rows in (1, 8, 32):
            first, *later = measure(params, rows)
            print(f"| {name} | {rows} | {1e3 * first:.1f} | {1e3 * statistics.median(later):.2f} |")


if __name__ == "__main__":
    main()
