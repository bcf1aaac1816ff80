"""Apply the mask of a grammar to a row of logits."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels.machine import offset

_i8 = types.int64


@m.intrinsic([_i8, _i8, _i8, _i8])
def mask(b: Any, x: Any, bits: Any, vectors: Any, out: Any) -> None:
    """Store x in out, with -inf where the bit is clear. What is not below infinity stays, to be noticed."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = m.load(b, offset(b, x, i, 64), m.FLOATS)
        kept = b.bitcast(m.load(b, offset(b, bits, i, 2), m.I16, 2), ir.VectorType(ir.IntType(1), m.LANES))
        wrong = b.fcmp_unordered(">=", value, m.floats(float("inf")))
        m.store(b, offset(b, out, i, 64), b.select(b.or_(kept, wrong), value, m.floats(float("-inf"))))
        return []

    m.counted_loop(b, vectors, [], body)
