"""Logarithm, exponential and noise have the same bits in numpy and in the kernels of CPU and GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from llvmlite import ir
from numba import njit, types

from headrace.worker.engine import fixed_math, noise
from headrace.worker.engine.cpu.kernels import machine, vector_math
from headrace.worker.engine.cpu.kernels.machine import offset

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from headrace.worker.engine.gpu.kernels.sampling import exact_math  # noqa: E402
from tests.worker.engine.gpu.device import DEVICE, HAS_CUDA  # noqa: E402

pytestmark = [pytest.mark.cuda] if HAS_CUDA else []

_i8 = types.int64
KEY = noise.noise_key(12345, 678)
TOKENS = 1 << 22
BLOCK = 1 << 18  # numbers that are compared at a time
SIZE = 1 << 11 if HAS_CUDA else BLOCK  # numbers of a program


@machine.intrinsic([_i8, _i8, _i8, _i8])
def _cpu_gumbel(b: Any, first: Any, second: Any, vectors: Any, out: Any) -> None:
    lanes = ir.Constant(machine.INTS, list(range(machine.LANES)))
    keys = [machine.splat(b, b.trunc(key, machine.I32)) for key in (first, second)]

    def body(i: Any, carried: list[Any]) -> list[Any]:
        start = machine.splat(b, b.trunc(b.mul(i, machine.integer(machine.LANES)), machine.I32))
        machine.store(b, offset(b, out, i, 64), vector_math.gumbel(b, b.add(lanes, start), *keys))
        return []

    machine.counted_loop(b, vectors, [], body)


@machine.intrinsic([_i8, _i8, _i8, _i8])
def _cpu_log_and_weight(b: Any, x: Any, vectors: Any, logs: Any, weights: Any) -> None:
    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = machine.load(b, offset(b, x, i, 64), machine.FLOATS)
        machine.store(b, offset(b, weights, i, 128), vector_math.weight(b, value), 8)
        positive = b.fsub(machine.floats(0.0), value)
        machine.store(b, offset(b, logs, i, 64), vector_math.log(b, positive))
        return []

    machine.counted_loop(b, vectors, [], body)


@njit  # type: ignore[untyped-decorator]
def _gumbel_on_cpu(first: int, second: int, vectors: int, out: int) -> None:
    _cpu_gumbel(first, second, vectors, out)


@njit  # type: ignore[untyped-decorator]
def _log_and_weight_on_cpu(x: int, vectors: int, logs: int, weights: int) -> None:
    _cpu_log_and_weight(x, vectors, logs, weights)


@triton.jit  # type: ignore[untyped-decorator]
def _gumbel_on_device(out: tl.tensor, first: tl.tensor, second: tl.tensor, SIZE: tl.constexpr) -> None:  # noqa: N803
    ids = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + ids, exact_math.gumbel(ids, tl.load(first), tl.load(second)))


@triton.jit  # type: ignore[untyped-decorator]
def _log_and_weight_on_device(
    x: tl.tensor, logs: tl.tensor, weights: tl.tensor, SIZE: tl.constexpr  # noqa: N803
) -> None:  # fmt: skip
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + places)
    tl.store(weights + places, exact_math.weight(value))
    tl.store(logs + places, exact_math.log(0.0 - value))


def test_noise_has_the_same_bits_everywhere() -> None:
    """For four million tokens: most of the 2^23 values that uniforms can have."""
    expected = noise.gumbel(np.array([KEY], np.int32), np.arange(TOKENS, dtype=np.int32)[None])[0]

    on_cpu = np.empty(TOKENS, np.float32)
    _gumbel_on_cpu(*KEY, TOKENS // machine.LANES, on_cpu.ctypes.data)
    on_device = torch.empty(TOKENS, device=DEVICE)
    words = torch.tensor(KEY, dtype=torch.int32, device=DEVICE)
    _gumbel_on_device[(TOKENS // SIZE,)](on_device, words[:1], words[1:], SIZE=SIZE, enable_fp_fusion=False)

    assert same_bits(on_cpu, expected)
    assert same_bits(on_device.cpu().numpy(), expected)


def test_logarithm_and_weights_have_the_same_bits_everywhere() -> None:
    """For negative numbers of all magnitudes, zero, minus infinity and the limits of the functions."""
    random = np.random.default_rng(1)
    x = -np.exp2(random.uniform(-126, 100, BLOCK)).astype(np.float32)
    x[: BLOCK // 2] = -random.uniform(0, 90, BLOCK // 2)
    x[:6] = 0, -np.inf, -87, np.nextafter(np.float32(-87), np.float32(0)), -1, -(2.0**-126)
    positive = x[2:] * np.float32(-1)
    logs, weights = fixed_math.log(positive), fixed_math.weight(x)

    cpu_logs, cpu_weights = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int64)
    _log_and_weight_on_cpu(
        x.ctypes.data, BLOCK // machine.LANES, cpu_logs.ctypes.data, cpu_weights.ctypes.data
    )
    device_logs = torch.empty(BLOCK, device=DEVICE)
    device_weights = torch.empty(BLOCK, dtype=torch.int64, device=DEVICE)
    _log_and_weight_on_device[(BLOCK // SIZE,)](
        torch.from_numpy(x).to(DEVICE), device_logs, device_weights, SIZE=SIZE, enable_fp_fusion=False
    )

    assert same_bits(cpu_logs[2:], logs)
    assert same_bits(device_logs.cpu().numpy()[2:], logs)
    assert (cpu_weights == weights).all()
    assert (device_weights.cpu().numpy() == weights).all()


def test_the_functions_are_accurate() -> None:
    uniform = (np.arange(1 << 23, dtype=np.float64) + 0.5) * 2.0**-23
    x = -np.random.default_rng(2).uniform(0, 87, 1 << 20).astype(np.float32)

    assert np.abs(fixed_math.log(uniform.astype(np.float32)) / np.log(uniform) - 1).max() < 2e-7
    assert np.abs(fixed_math.exp(x) / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    limits = fixed_math.exp(np.array([0, -0.0, -87, -np.inf, np.nan], np.float32))
    assert limits.tolist() == [1, 1, 0, 0, 0]


def test_keys_of_many_draws_are_those_of_single_draws() -> None:
    random = np.random.default_rng(3)
    seeds = random.integers(0, 2**64, 100, np.uint64)
    positions = random.integers(0, 2**31, 100, np.uint64)

    keys = noise.noise_keys(seeds, positions)

    expected = [noise.noise_key(*one) for one in zip(seeds.tolist(), positions.tolist(), strict=True)]
    assert keys.tolist() == [list(key) for key in expected]


def same_bits(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> bool:
    return bool((left.view(np.int32) == right.view(np.int32)).all())
