"""Products with matrices in panels, compared with plain ones, and with themselves in other batches."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from headrace.worker.engine.cpu.kernels import machine
from headrace.worker.engine.cpu.kernels.elementwise import pack_row
from headrace.worker.engine.cpu.kernels.matmul import ELEMENT_BYTES, GROUP, PANEL, ElementType, multiply_panel
from headrace.worker.engine.cpu.weight_layout import lay_out

ELEMENT_TYPES = [
    pytest.param(
        element_type,
        marks=pytest.mark.skipif(
            element_type is ElementType.INT8 and not machine.HAS_VNNI, reason="needs avx512_vnni"
        ),
    )
    for element_type in ElementType
]
# Relative errors: float32 sums, 8 bits of mantissa, 8 bits of weights and activations.
TOLERANCE = {ElementType.FLOAT32: 1e-6, ElementType.BFLOAT16: 6e-3, ElementType.INT8: 2e-2}


@njit  # type: ignore[untyped-decorator]
def multiply(
    element_type: int,
    add: bool,
    matrix: Any,
    rows: int,
    x: int,
    inputs: int,
    packed: int,
    scales: int,
    out: int,
) -> None:
    size = 1 if element_type == 0 else (2 if element_type == 1 else 4)
    for row in range(rows):
        pack_row(
            element_type,
            x + 4 * inputs * row,
            inputs,
            packed + size * inputs * row,
            scales + 4 * (inputs // 64) * row,
        )
    for panel in range(matrix.count):
        multiply_panel(
            element_type,
            add,
            matrix,
            panel,
            panel + 1,
            rows,
            packed,
            scales,
            out + 128 * panel,
            128 * matrix.count,
        )


def product(
    element_type: ElementType,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute x @ weights.T + bias with the kernels, and add it to *out* if given."""
    owned: list[torch.Tensor] = []
    matrix: npt.NDArray[Any] = lay_out([weights], bias, element_type, owned)
    rows, inputs = x.shape
    packed = torch.zeros(rows * inputs * ELEMENT_BYTES[element_type], dtype=torch.uint8)
    scales = torch.zeros(rows, inputs // GROUP + 1)
    made = torch.full((rows, int(matrix["count"][0]) * PANEL), 7.0)
    if out is not None:
        made[:, : len(weights)] = out
    x = x.contiguous()
    addresses = [tensor.data_ptr() for tensor in (packed, scales, made)]
    multiply(int(element_type), out is not None, matrix[0], rows, x.data_ptr(), inputs, *addresses)
    return made[:, : len(weights)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("element_type", ELEMENT_TYPES)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 32), (5, 128, 50), (13, 576, 96), (27, 320, 33)]
)
def test_products_equal_those_of_plain_torch(
    element_type: ElementType, rows: int, inputs: int, outputs: int
) -> None:
    weights, bias, x = numbers(outputs, inputs), numbers(outputs, seed=1), numbers(rows, inputs, seed=2)
    before = numbers(rows, outputs, seed=3)
    expected = torch.nn.functional.linear(x.double(), weights.double(), bias.double())

    stored = product(element_type, weights, bias, x)
    added = product(element_type, weights, bias, x, before)

    assert (stored - expected).norm() <= TOLERANCE[element_type] * expected.norm()
    assert torch.equal(added, stored + before)


@pytest.mark.parametrize("element_type", ELEMENT_TYPES)
@given(rows=st.integers(1, 40), seed=st.integers(0, 5))
def test_a_row_is_bit_identical_in_any_batch(element_type: ElementType, rows: int, seed: int) -> None:
    """Exact resume depends on it."""
    weights, x = numbers(64, 128, seed=seed), numbers(rows, 128, seed=rows)

    together = product(element_type, weights, None, x)

    for row in range(rows):
        assert torch.equal(product(element_type, weights, None, x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("element_type", ELEMENT_TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_affects_only_its_row(element_type: ElementType, bad: float) -> None:
    """Rounded to eight bits, it could look like a number."""
    weights, x = numbers(64, 128), numbers(4, 128, seed=1)
    clean = product(element_type, weights, None, x)
    x[2, 77] = bad

    spoilt = product(element_type, weights, None, x)

    assert not spoilt[2].isfinite().any()
    assert torch.equal(spoilt[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.skipif(not machine.HAS_VNNI, reason="needs avx512_vnni")
def test_int8_supports_rows_of_zeros_and_of_any_magnitude() -> None:
    weights = numbers(64, 128)
    x = torch.stack([torch.zeros(128), *(numbers(128, seed=1) * scale for scale in (1e-30, 1e-3, 1e3, 1e30))])
    expected = x.double() @ weights.double().T

    made = product(ElementType.INT8, weights, None, x)

    assert not made[0].any()
    for row in range(1, 5):
        assert (made[row] - expected[row]).norm() <= TOLERANCE[ElementType.INT8] * expected[row].norm()
