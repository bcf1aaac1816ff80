"""Measure the limits of this machine: memory bandwidth and multiplication rate.

Both are the best of several runs: reading a block far larger than the caches, and the multiply-add
instruction of the dtype on numbers that stay in registers. No engine can be faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types

from headrace.worker.engine.cpu.kernels import machine, team
from headrace.worker.engine.cpu.kernels.matmul import ELEMENT_BYTES, ElementType

_SLICES = 8


@dataclass(frozen=True)
class Shapes:
    """The linear layers of a model.

    layers       [outputs, inputs] of each linear layer, layer by layer, the head last
    kv_values    numbers in the keys and values of one position, in all layers together
    group        query heads per KV head
    """

    layers: Sequence[tuple[int, int]]
    kv_values: int
    group: int

    @property
    def weights(self) -> int:
        """Number of parameters that a step reads."""
        return sum(outputs * inputs for outputs, inputs in self.layers)


def shapes(config: Any) -> Shapes:
    """Read the shapes of a Llama-like model from its config; projections of one input count as one."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    kv = config.num_key_value_heads * head
    each = [
        (heads * head + 2 * kv, hidden),
        (hidden, heads * head),
        (2 * config.intermediate_size, hidden),
        (hidden, config.intermediate_size),
    ]
    layers = each * config.num_hidden_layers + [(config.vocab_size, hidden)]
    return Shapes(layers, 2 * kv * config.num_hidden_layers, heads // config.num_key_value_heads)


def best(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls of *work*."""
    work()
    times = []
    for _ in range(_SLICES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def bandwidth() -> float:
    """Measure memory bandwidth in bytes per second, with a block far larger than the caches."""
    block = torch.ones(1 << 27)
    return block.numel() * block.element_size() / best(block.sum)


def multiplications(element_type: ElementType, threads: int) -> float:
    """Measure multiply-adds per second, with the instruction that the kernels use."""
    rounds = 200_000
    plan = np.array([int(element_type), rounds, 0], np.int64)
    seconds = best(lambda: team.run(_spin, plan.ctypes.data, threads, team.FailureState(threads)))
    return threads * rounds * _CHAINS * machine.LANES * (4 // ELEMENT_BYTES[element_type]) / seconds


_CHAINS = 16  # independent sums: enough to hide the latency of an instruction


def _chains(dot: Callable[..., Any], zero: Any) -> Any:
    def emit(b: Any, rounds: Any) -> Any:
        # The compiler must not know the factors: it would compute products of constants in advance. As
        # bfloat16 and float32 these are about 1, so that sums stay normal.
        number = machine.splat(b, b.trunc(rounds, machine.I32))
        ones = b.or_(number, machine.ints(0x3F803F80))

        def body(_: Any, sums: list[Any]) -> list[Any]:
            return [dot(b, held, ones, ones) for held in sums]

        sums = machine.counted_loop(b, rounds, [zero] * _CHAINS, body)
        # Without a use of the sums, the compiler would remove the loop.
        total = sums[0]
        for held in sums[1:]:
            total = b.add(total, held) if zero.type == machine.INTS else b.fadd(total, held)
        bits = b.bitcast(total, machine.INTS)
        return b.zext(b.extract_element(bits, ir.Constant(machine.I32, 0)), machine.I64)

    return machine.make_intrinsic([types.int64], emit, types.int64)


def _fma(b: Any, held: Any, left: Any, right: Any) -> Any:
    return machine.fma(b, b.bitcast(left, machine.FLOATS), b.bitcast(right, machine.FLOATS), held)


_int8 = _chains(machine.dot_int8, machine.ints(0))
_bfloat16 = _chains(machine.dot_bf16, machine.floats(0.0))
_float32 = _chains(_fma, machine.floats(0.0))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _work(element_type: int, rounds: int) -> int:
    if element_type == 0:
        return int(_int8(rounds))
    if element_type == 1:
        return int(_bfloat16(rounds))
    return int(_float32(rounds))


@cfunc(types.void(types.voidptr))  # type: ignore[untyped-decorator]
def _spin(data: Any) -> None:
    plan = carray(data, (3,), np.int64)
    plan[2] = _work(plan[0], plan[1])
