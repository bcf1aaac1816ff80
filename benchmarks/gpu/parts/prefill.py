"""Measure steps of prompt tokens: 2,048 of them, two prompts of 1,024 tokens."""

from __future__ import annotations

from benchmarks.gpu import engines, limits
from benchmarks.gpu.parts.steps import filled
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Shape


def run(report: Report, shape: Shape | None) -> None:
    """Measure one model."""
    assert shape is not None
    _, sequences, seconds = filled(shape, report.options)
    if not seconds:
        report.row("prompts were computed before this part", note="not measured")
        return
    tokens = sum(len(sequence.ids) - 1 for sequence in sequences.all)
    ceilings = report.ceilings
    report.row(
        f"steps of {engines.sizes(report.options).step_tokens} tokens",
        tokens / seconds,
        "tokens/s",
        limit=limits.prefill_tokens_per_second(shape, ceilings) if ceilings else None,
        goal=limits.PREFILL.get(shape.name),
        note=f"{len(sequences)} prompts, {tokens} tokens",
    )
    report.fact(f"prefill {shape.name}", tokens / seconds)
