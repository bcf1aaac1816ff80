"""Matrix products: right, and of the same bits whatever rows are computed together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from headrace.worker.engine.gpu.kernels import matmul as module
from headrace.worker.engine.gpu.kernels.matmul import SEGMENT, matmul

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def operands(
    rows: int, columns: int, depth: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weights, bias = torch.randn(rows, depth), torch.randn(columns, depth) * 0.1, torch.randn(columns)
    return x.to(dtype), weights.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1, 1, 8), (1, 130, 64), (3, 40, 72), (65, 200, 128), (2, 24, SEGMENT + 8), (70, 30, 2 * SEGMENT + 64)],
)
def test_products_are_those_of_double_precision(
    rows: int, columns: int, depth: int, biased: bool, dtype: torch.dtype
) -> None:
    x, weights, bias = operands(rows, columns, depth, dtype)
    expected = x.double() @ weights.double().T + (bias.double() if biased else 0)

    seen = matmul(x, weights, bias if biased else None)

    assert seen.dtype is dtype
    assert (seen.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_the_result_is_written_where_requested() -> None:
    x, weights, _ = operands(3, 40, 32, torch.float32)
    out = torch.empty(3, 40)

    assert matmul(x, weights, out=out) is out
    assert torch.equal(out, matmul(x, weights))


def test_rows_may_have_a_distance() -> None:
    x, weights, _ = operands(6, 40, 64, torch.float32)
    view, own = x[::2, 8:40], weights[:, 8:40].contiguous()

    assert torch.equal(matmul(view, own), matmul(view.contiguous(), own))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("depth", [96, SEGMENT + 32])
def test_a_row_has_the_same_bits_alone_among_many_and_in_any_place(
    depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGE_FROM", 100)
    x, weights, bias = operands(140, 30, depth, dtype)
    whole = matmul(x, weights, bias)

    for rows in (1, 17, 65):
        assert torch.equal(matmul(x[:rows], weights, bias), whole[:rows])
    order = torch.randperm(140)
    assert torch.equal(matmul(x[order], weights, bias), whole[order])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_segments_of_their_own_programs_change_no_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights, bias = operands(20, 40, 3 * SEGMENT + 40, dtype)
    split = matmul(x, weights, bias)
    monkeypatch.setattr(module, "_FEW_PROGRAMS", 0)

    assert torch.equal(matmul(x, weights, bias), split)


def test_a_row_with_nan_does_not_affect_others() -> None:
    x, weights, _ = operands(4, 40, 64, torch.float32)
    expected = matmul(x, weights)
    x[2] = float("nan")

    seen = matmul(x, weights)

    assert torch.equal(seen[[0, 1, 3]], expected[[0, 1, 3]])
    assert seen[2].isnan().all()


def test_all_tiles_of_a_device_compile_to_the_same_instruction() -> None:
    """Another instruction may add in another order."""
    script = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from headrace.worker.engine.gpu.kernels import matmul
for variant in matmul.variants():
    for target in variant.targets:
        names = variant.kernel.arg_names
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                   if name in variant.aligned or variant.signature.get(name, "").startswith("*")}
        signature = {name: variant.signature.get(name, "constexpr") for name in names}
        source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=aligned)
        options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages, enable_fp_fusion=True)
        ptx = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["ptx"]
        shapes = set(re.findall(r"mma(?:_async)?\\.sync\\.aligned\\.(m\\d+n\\d+k\\d+)", ptx))
        print(target, *sorted(shapes))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )

    assert set(compiled.stdout.splitlines()) == {"80 m16n8k16", "90 m64n128k16"}
