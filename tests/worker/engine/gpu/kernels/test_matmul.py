"""Matrix products: right, and of the same bits whatever rows are computed together."""

from __future__ import annotations

import pytest
import torch

from headrace.worker.engine.gpu.kernels import matmul as module
from headrace.worker.engine.gpu.kernels.matmul import SEGMENT, matmul, tile_of
from tests.worker.engine.gpu.device import DEVICE, DTYPES, needs_cuda

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def operands(
    rows: int, columns: int, depth: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weights, bias = torch.randn(rows, depth), torch.randn(columns, depth) * 0.1, torch.randn(columns)
    return x.to(DEVICE, dtype), weights.to(DEVICE, dtype), bias.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
    out = torch.empty(3, 40, device=DEVICE)

    assert matmul(x, weights, out=out) is out
    assert torch.equal(out, matmul(x, weights))


def test_rows_may_have_a_distance() -> None:
    x, weights, _ = operands(6, 40, 64, torch.float32)
    view, own = x[::2, 8:40], weights[:, 8:40].contiguous()

    assert torch.equal(matmul(view, own), matmul(view.contiguous(), own))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [96, SEGMENT + 32])
def test_a_row_has_the_same_bits_alone_among_many_and_in_any_place(
    depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGE_FROM", 100)
    x, weights, bias = operands(140, 30, depth, dtype)
    whole = matmul(x, weights, bias)

    for rows in (1, 17, 65):
        assert torch.equal(matmul(x[:rows], weights, bias), whole[:rows])
    order = torch.randperm(140, device=DEVICE)
    assert torch.equal(matmul(x[order], weights, bias), whole[order])


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("columns", "depth"), [(1000, 896), (4096, 4096), (300, 2 * SEGMENT + 72)])
def test_a_row_of_a_large_product_has_the_same_bits_for_all_numbers_of_rows(
    columns: int, depth: int, dtype: torch.dtype
) -> None:
    """With the sizes of real models, for which tiles and splits differ by the number of rows."""
    x, weights, bias = operands(2048, columns, depth, dtype)
    expected = x.double() @ weights.double().T + bias.double()
    whole = matmul(x, weights, bias)

    assert (whole.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    for rows in (1, 2, 17, 33, 64, 128, 256, 257, 511, 512, 1024):
        assert torch.equal(matmul(x[:rows], weights, bias), whole[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_of_their_own_programs_change_no_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights, bias = operands(20, 40, 3 * SEGMENT + 40, dtype)
    split = matmul(x, weights, bias)
    monkeypatch.setattr(module, "_FEW_PROGRAMS", 0)

    assert torch.equal(matmul(x, weights, bias), split)


def test_devices_with_the_instructions_of_8_have_its_tiles() -> None:
    """Those of 9 spill registers there."""
    for rows in (1, 2048):
        of_8, of_9, of_12 = (tile_of(rows, torch.bfloat16, major) for major in (8, 9, 12))

        assert of_12 == of_8 != of_9 == tile_of(rows, torch.bfloat16, 10)


def test_a_row_with_nan_does_not_affect_others() -> None:
    x, weights, _ = operands(4, 40, 64, torch.float32)
    expected = matmul(x, weights)
    x[2] = float("nan")

    seen = matmul(x, weights)

    assert torch.equal(seen[[0, 1, 3]], expected[[0, 1, 3]])
    assert seen[2].isnan().all()
