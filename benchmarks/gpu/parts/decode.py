"""Measure steps of decodes: 1, 32 and 256 sequences of 1,024 tokens."""

from __future__ import annotations

from benchmarks.gpu import limits
from benchmarks.gpu.parts.steps import CONTEXT, filled
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Shape

ROWS = (1, 32, 256)
_TINY_ROWS = (1, 3)
_STEPS, _WARM_UP = 64, 4


def run(report: Report, shape: Shape | None) -> None:
    """Measure one model."""
    assert shape is not None
    for rows, rate in rates(report, shape, exact=False).items():
        report.fact(f"decode {shape.name} {rows}", rate)


def rates(report: Report, shape: Shape, *, exact: bool) -> dict[int, float]:
    """Measure and report steps of each number of rows. Returns tokens per second by rows."""
    rehearse = report.options.rehearse
    _, sequences, _ = filled(shape, report.options, exact=exact)
    steps = 2 if rehearse else _STEPS
    found = {}
    for wanted in _TINY_ROWS if rehearse else ROWS:
        rows = min(wanted, len(sequences))
        sequences.decode(rows, 1 if rehearse else _WARM_UP)
        seconds = sequences.decode(rows, steps)
        found[wanted] = rate = rows * steps / seconds
        ceilings = report.ceilings
        report.row(
            f"B = {rows}{', exact mode' if exact else ''}",
            rate,
            "tokens/s",
            limit=limits.decode_tokens_per_second(shape, ceilings, rows, CONTEXT) if ceilings else None,
            goal=None if exact else limits.DECODE.get((shape.name, rows)),
            note=f"{1e3 * seconds / steps:.3g} ms a step"
            + (f"; KV memory holds only {rows} sequences" if rows < wanted else ""),
        )
    return found
