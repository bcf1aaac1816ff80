"""Measure the start of a worker's engine, and compare its results with transformers' own in float32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu import engines
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Shape, random_network
from headrace.worker.engine.interface import Engine, SamplingParams

_DECODES = 8  # tokens of each sequence that are computed one by one
_LENGTHS = (9, 40, 264, 700)
_TINY_LENGTHS = (9, 24)


def run(report: Report, shape: Shape | None) -> None:
    """Measure one model."""
    assert shape is not None
    options = report.options
    drawn = random.Random(1)
    lengths = _TINY_LENGTHS if options.rehearse else _LENGTHS
    ids = [[drawn.randrange(shape.vocabulary - 1) for _ in range(length)] for length in lengths]
    expected, rounded = _references(shape, ids, options.device, options.dtype)
    report.say("loading the engine")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats(options.device)
    held = engines.held(shape, options)
    model = held.engine.model
    report.row("time until ready", held.seconds, "s", note="; ".join(_stages(held.stages, held.seconds)))
    report.row("KV memory", model.kv_tokens, "tokens", note="exact" if model.exact else "not exact")
    if torch.device(options.device).type == "cuda":
        report.row("memory in use", torch.cuda.memory_reserved(options.device) / 2**30, "GiB")
        report.row("peak memory of the start", torch.cuda.max_memory_reserved(options.device) / 2**30, "GiB")
    _compare(report, held.engine, ids, expected, rounded)


def _stages(stages: Sequence[tuple[float, str]], end: float) -> list[str]:
    """Describe what loading did, with the seconds that each stage took."""
    ends = [began for began, _ in stages[1:]] + [end]
    return [f"{text} {until - began:.1f} s" for (began, text), until in zip(stages, ends, strict=True)]


@torch.inference_mode()
def _references(
    shape: Shape, ids: Sequence[Sequence[int]], device: str, dtype: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the log-probabilities of the last tokens by transformers: in float32, and in the model's dtype.

    Both [_DECODES, vocabulary] per sequence, on the CPU.
    """
    network = random_network(shape, device, dtype, "sdpa")
    rounded = _logprobs(network, ids)
    expected = _logprobs(network.float(), ids)
    del network
    engines.release()
    return expected, rounded


def _logprobs(network: Any, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    found = []
    for own in ids:
        logits = network(input_ids=torch.tensor([own], device=network.device), use_cache=False).logits[0]
        found.append(logits[-_DECODES:].float().log_softmax(-1).cpu())
    return found


def _compare(
    report: Report,
    engine: Engine,
    ids: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
    rounded: Sequence[torch.Tensor],
) -> None:
    params = SamplingParams(seed=1, max_tokens=1 << 20, temperature=0.0, ignore_eos=True, logprobs=True)
    sequences = engines.Sequences(engine, ids, room=1, params=params)
    begins = [len(own) - _DECODES + 1 for own in ids]
    sampled = sequences.forced(ids, begins)
    ours, theirs, decided, agreed = 0.0, 0.0, 0, 0
    for tokens, exact, close in zip(sampled, expected, rounded, strict=True):
        for token, right, other in zip(tokens, exact, close, strict=True):
            assert token.logprob is not None
            ours = max(ours, abs(token.logprob - float(right[token.id])))
            # At the most likely tokens, because those are what we measure of our own.
            likely = right.topk(4).indices
            theirs = max(theirs, float((other[likely] - right[likely]).abs().max()))
            first, second = right.topk(2).values.tolist()
            if first - second > 2 * max(ours, theirs):
                decided += 1
                agreed += int(token.id == int(right.argmax()))
    report.row(
        "error of log-probabilities, transformers' in the same dtype over ours",
        theirs / max(ours, 1e-9),
        goal=(1 / 3, 1.0),
        note=f"ours {ours:.2g}, transformers' {theirs:.2g}, both beside transformers in float32",
    )
    report.row("greedy tokens that agree", agreed, "tokens", note=f"of {decided} that rounding cannot change")
    if agreed < decided:
        raise RuntimeError(f"{decided - agreed} of {decided} greedy tokens differ from transformers'")
