"""The emulator on small kernels of Triton: it computes what right ones do, and shows what wrong ones do.

`test_emulated` runs these in a process with the plugin, as kernels of other processes are interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.worker.engine.gpu.ptx.emulation import Emulated
from tests.worker.engine.gpu.ptx.errors import EmulationError, UnknownInstructionError
from tests.worker.engine.gpu.ptx.memory import memory_of

SEEDS = 8  # orders of which one must show a fault


@triton.jit  # type: ignore[untyped-decorator]
def _total(x: tl.tensor, out: tl.tensor, size: tl.constexpr) -> None:
    numbers = tl.load(x + tl.program_id(0) * size + tl.arange(0, size))
    tl.store(out + tl.program_id(0), tl.sum(numbers))


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(
    x: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    depth: tl.tensor,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    row, column, at = tl.arange(0, rows), tl.arange(0, columns), tl.arange(0, 64)
    total = tl.zeros((rows, columns), dtype=tl.float32)
    for begin in range(0, depth, 64):
        left = tl.load(x + row[:, None] * depth + begin + at[None, :])
        right = tl.load(weights + column[None, :] * depth + begin + at[:, None])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * columns + column[None, :], total)


@triton.jit  # type: ignore[untyped-decorator]
def _copy(x: tl.tensor, out: tl.tensor, count: tl.tensor, size: tl.constexpr) -> None:
    at = tl.arange(0, size)
    tl.store(out + at, tl.load(x + at, mask=at < count))


def ptx_of(kernel: Any, *arguments: Any, **options: Any) -> tuple[str, int]:
    """Return the PTX of a kernel for these arguments, and its bytes of shared memory."""
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    return compiled.asm["ptx"].decode(), compiled.metadata.shared


def run(
    ptx: str, shared: int, tensors: Mapping[str, torch.Tensor], *numbers: int, seed: int = 0, grid: int = 1
) -> None:
    """Run a kernel whose arguments are tensors, then integers."""
    kernel = Emulated(ptx, shared)
    bits = [*(tensor.data_ptr() for tensor in tensors.values()), *numbers, 0, 0]
    names = kernel.kernel.parameters
    kernel.run((grid,), dict(zip(names, bits, strict=False)), memory_of(tensors), Random(seed))


def wrong_seeds(compute: Callable[[int], torch.Tensor], expected: torch.Tensor) -> int:
    """Return with how many seeds a computation does not give what is expected, or fails."""
    wrong = 0
    for seed in range(SEEDS):
        try:
            wrong += not torch.allclose(compute(seed), expected, rtol=1e-3, atol=1e-3)
        except EmulationError:
            wrong += 1
    return wrong


def test_warps_add_their_sums() -> None:
    x = torch.randn(3, 1024)
    out = torch.zeros(3)

    _total[(3,)](x, out, size=1024, num_warps=8)

    torch.testing.assert_close(out, x.sum(1))


def test_a_missing_barrier_gives_wrong_sums_with_some_seed() -> None:
    x, out = torch.randn(1024), torch.zeros(1)
    ptx, shared = ptx_of(_total, x, out, size=1024, num_warps=8)
    assert "bar.sync" in ptx

    def total(seed: int, text: str) -> torch.Tensor:
        run(text, shared, {"x": x, "out": out}, seed=seed)
        return out

    assert wrong_seeds(lambda seed: total(seed, ptx), x.sum()[None]) == 0
    without = re.sub(r"bar\.sync[^;]*;", "", ptx)
    assert wrong_seeds(lambda seed: total(seed, without), x.sum()[None]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "warps", "instruction"),
    [(16, 32, 2, "mma.sync"), (64, 64, 4, "wgmma.mma_async"), (128, 64, 8, "wgmma.mma_async")],
)
def test_tensor_cores_multiply_what_asynchronous_copies_bring(
    rows: int, columns: int, warps: int, instruction: str, dtype: torch.dtype
) -> None:
    x, weights = torch.randn(rows, 256).to(dtype), torch.randn(columns, 256).to(dtype)
    out = torch.zeros(rows, columns)
    options = {"rows": rows, "columns": columns, "num_warps": warps, "num_stages": 3}
    ptx, _ = ptx_of(_multiply, x, weights, out, 256, **options)
    assert instruction in ptx
    assert "cp.async.c" in ptx

    _multiply[(1,)](x, weights, out, 256, **options)

    expected = x.double() @ weights.double().T
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "warps", "removed"),
    [
        (16, 2, r"cp\.async\.wait_group[^;]*;"),
        (64, 4, r"cp\.async\.wait_group[^;]*;"),
        (64, 4, r"wgmma\.wait_group[^;]*;"),
        (16, 2, r"bar\.sync[^;]*;"),
        (64, 4, r"bar\.sync[^;]*;"),
    ],
)
def test_a_missing_wait_gives_a_wrong_product_with_some_seed(rows: int, warps: int, removed: str) -> None:
    x, weights = torch.randn(rows, 256).bfloat16(), torch.randn(32, 256).bfloat16()
    out = torch.zeros(rows, 32)
    options = {"rows": rows, "columns": 32, "num_warps": warps, "num_stages": 3}
    ptx, shared = ptx_of(_multiply, x, weights, out, 256, **options)
    expected = x.float() @ weights.float().T

    def product(seed: int, text: str) -> torch.Tensor:
        run(text, shared, {"x": x, "weights": weights, "out": out}, 256, seed=seed)
        return out

    assert wrong_seeds(lambda seed: product(seed, ptx), expected) == 0
    assert re.search(removed, ptx)
    assert wrong_seeds(lambda seed: product(seed, re.sub(removed, "", ptx)), expected) > 0


def test_an_access_outside_of_a_tensor_is_an_error_that_names_its_place() -> None:
    storage = torch.zeros(300)
    x, out = torch.ones(300), storage[100:220]

    with pytest.raises(EmulationError) as raised:
        _copy[(1,)](x, out, 250, size=256, num_warps=4)

    message = str(raised.value)
    for part in (
        "_copy, program (0, 0, 0) of (1, 1, 1), warp",
        "st.global",
        "emulator_cases.py:",
        "out has 480 bytes",
    ):
        assert part in message
    assert "HEADRACE_PTX_SEED=" in raised.value.__notes__[0]
    assert (storage[220:] == 0).all()


def test_what_a_mask_hides_may_be_outside() -> None:
    out = torch.full((256,), 7.0)

    _copy[(1,)](torch.ones(100), out, 100, size=256, num_warps=4)

    assert (out[:100] == 1).all()


def test_an_unknown_instruction_is_named() -> None:
    x, out = torch.randn(128), torch.zeros(1)
    ptx, shared = ptx_of(_total, x, out, size=128, num_warps=4)

    for unknown in ("frobnicate.f32", "add.rm.f32"):
        with pytest.raises(UnknownInstructionError, match=unknown):
            Emulated(ptx.replace("add.f32", unknown), shared)


def test_warps_that_do_not_meet_at_a_barrier_are_an_error() -> None:
    x, out = torch.randn(1024), torch.zeros(1)
    ptx, shared = ptx_of(_total, x, out, size=1024, num_warps=8)
    # The first warp leaves before the barrier.
    early = ptx.replace("bar.sync", "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync", 1)

    with pytest.raises(EmulationError, match="different places"):
        run(early, shared, {"x": x, "out": out})
