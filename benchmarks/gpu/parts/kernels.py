"""Measure attention and sampling beside what memory and matrix products allow, and beside SDPA of torch."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.device_steps import GREEDY, DeviceStep, make_step
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import SHAPES, Shape
from benchmarks.gpu.timing import seconds_of, seconds_of_launches
from headrace.worker.engine.interface import SamplingParams

_MODELS = ("llama-3-8b", "qwen3-0.6b", "qwen2.5-0.5b")
_DECODES = ((1, 1024), (1, 16_384), (32, 1024), (256, 1024))  # rows and their keys
_CHUNK = 1024  # tokens of each of two prompts in a step
# So much memory is read in turn that it does not stay in the cache of the device.
_READ_BYTES = 256 << 20
_SAMPLED = (
    ("greedy", GREEDY),
    ("temperature", SamplingParams(seed=1, max_tokens=1 << 20, temperature=0.6)),
    ("top_p and top_k", SamplingParams(seed=1, max_tokens=1 << 20, temperature=0.6, top_p=0.9, top_k=50)),
    (
        "penalties",
        SamplingParams(seed=1, max_tokens=1 << 20, repetition_penalty=1.1, frequency_penalty=0.1),
    ),
)


def run(report: Report, shape: Shape | None) -> None:
    """Measure the kernels, as long as there is time."""
    rehearse = report.options.rehearse
    models = [SHAPES["tiny-llama"]] if rehearse else [SHAPES[name] for name in _MODELS]
    decodes = ((2, 70),) if rehearse else _DECODES
    measured: list[Callable[[], None]] = [
        *(partial(_decode, report, model, *step) for model in models for step in decodes),
        *(partial(_prefill, report, model, 40 if rehearse else _CHUNK) for model in models),
        *(partial(_sampling, report, models[0], 3 if rehearse else 256, *kind) for kind in _SAMPLED),
    ]
    errors = []
    for number, measure in enumerate(measured):
        if report.left < 5:
            report.row(f"{len(measured) - number} measurements", note="skipped: no time is left")
            break
        try:
            with torch.inference_mode():
                measure()
        except Exception as error:  # the others may work
            traceback.print_exc()
            errors.append(f"{type(error).__name__}: {error}".strip().splitlines()[0])
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(measured)} measurements failed: {'; '.join(errors)}")


def _setting(report: Report) -> tuple[torch.device, torch.dtype]:
    return torch.device(report.options.device), getattr(torch, report.options.dtype)


def _decode(report: Report, shape: Shape, rows: int, keys: int) -> None:
    device, dtype = _setting(report)
    row_bytes = rows * keys * shape.kv_numbers // shape.layers * dtype.itemsize
    layers = 1 if report.options.rehearse else max(-(-_READ_BYTES // row_bytes), 1)
    step = make_step(shape, [(keys - 1, keys)] * rows, device, dtype, layers=layers)
    ours = _attention_seconds(step, shape, device, dtype) / layers
    theirs = _beside_torch(shape, rows, 1, keys, device, dtype, layers)
    report.row(
        f"attention of decodes, {shape.name}, B = {rows}, {keys} keys",
        row_bytes / ours / 1e9,
        "GB/s",
        limit=report.facts["copy"] / 1e9 if "copy" in report.facts else None,
        note=f"{1e6 * ours:.1f} us, {theirs}",
    )


def _prefill(report: Report, shape: Shape, chunk: int) -> None:
    device, dtype = _setting(report)
    flops = 2 * 4 * shape.heads * shape.head_dim * chunk * (chunk + 1) / 2
    theirs = _beside_torch(shape, 2, chunk, chunk, device, dtype, 1)
    for exact in (False, True):
        step = make_step(shape, [(0, chunk)] * 2, device, dtype, layers=1, exact=exact)
        ours = _attention_seconds(step, shape, device, dtype)
        report.row(
            f"attention of two prompts of {chunk}, {shape.name}{', exact mode' if exact else ''}",
            flops / ours / 1e12,
            "TFLOP/s",
            limit=report.facts["flops"] / 1e12 if "flops" in report.facts else None,
            note=f"{1e6 * ours:.0f} us, {theirs}",
        )


def _attention_seconds(step: DeviceStep, shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """Time attention in all layers of the step."""
    query = torch.randn(step.inputs.shape.tokens, shape.heads, shape.head_dim, device=device, dtype=dtype)
    out = torch.empty_like(query)
    return seconds_of(partial(step.attend, query, out), device, budget=0.1)


def _beside_torch(
    shape: Shape,
    rows: int,
    queries: int,
    keys: int,
    device: torch.device,
    dtype: torch.dtype,
    layers: int,
) -> str:
    """Time a layer of torch's attention, of as many layers, for rows of equal length: it has no pages.

    Returns a note. An error of it is not one of ours.
    """
    query = torch.randn(rows, shape.heads, queries, shape.head_dim, device=device, dtype=dtype)
    held = torch.randn(layers, 2, rows, shape.kv_heads, keys, shape.head_dim, device=device, dtype=dtype)

    def attend() -> None:
        for key, value in held:
            torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=queries > 1, enable_gqa=True
            )

    # Some of its implementations cannot be captured.
    measure = seconds_of_launches if layers == 1 else seconds_of
    try:
        seconds = measure(attend, device, budget=0.1) / layers
    except Exception as error:
        return f"SDPA of torch failed: {type(error).__name__}: {error}".splitlines()[0][:200]
    return f"SDPA of torch over contiguous keys {1e6 * seconds:.1f} us"


def _sampling(report: Report, shape: Shape, rows: int, name: str, params: SamplingParams) -> None:
    """Time a whole sampling of *rows* rows, whose logits must be read at least once."""
    from headrace.worker.engine.gpu.sampler import DeviceSampler

    device, dtype = _setting(report)
    logits = torch.randn(rows, shape.vocabulary, device=device).mul_(3).to(dtype)
    results = torch.zeros(3, rows, dtype=torch.int32, device=device)
    step = make_step(shape, [(39, 40)] * rows, device, dtype, layers=1, params=params)
    sampler = DeviceSampler(rows, shape.vocabulary, frozenset({shape.vocabulary - 1}), device)
    for row in step.rows:
        if fault := sampler.assign(row.memo.kept.index, row):
            raise RuntimeError(fault.message)
    seconds = seconds_of(partial(sampler.draw, logits, step.inputs, results), device, budget=0.1)
    report.row(
        f"sampling, {name}, B = {rows}, {shape.vocabulary} tokens",
        1e6 * seconds,
        "us",
        note=_beside_bandwidth(report, seconds, logits),
    )


def _beside_bandwidth(report: Report, seconds: float, logits: torch.Tensor) -> str:
    if "copy" not in report.facts:
        return ""
    return f"reading the logits once takes {1e6 * logits.nbytes / report.facts['copy']:.0f} us"
