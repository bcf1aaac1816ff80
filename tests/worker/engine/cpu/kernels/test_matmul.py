"""Products by matrices laid out in panels, against plain ones, and against themselves in other batches."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from headrace.worker.engine.cpu.decoder import lay_out
from headrace.worker.engine.cpu.kernels import machine
from headrace.worker.engine.cpu.kernels.elementwise import pack_row
from headrace.worker.engine.cpu.kernels.matmul import ELEMENT_BYTES, GROUP, PANEL, Kind, multiply_panel

KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(kind is Kind.INT8 and not machine.HAS_VNNI, reason="needs avx512_vnni")
    )
    for kind in Kind
]
# Of the size of the results: float32 sums, 8 bits of mantissa, 8 bits of weights and activations.
TOLERANCE = {Kind.FLOAT32: 1e-6, Kind.BFLOAT16: 6e-3, Kind.INT8: 2e-2}


@njit  # type: ignore[untyped-decorator]
def multiply(
    kind: int, add: bool, matrix: Any, rows: int, x: int, inputs: int, packed: int, scales: int, out: int
) -> None:
    size = 1 if kind == 0 else (2 if kind == 1 else 4)
    for row in range(rows):
        pack_row(
            kind,
            x + 4 * inputs * row,
            inputs,
            packed + size * inputs * row,
            scales + 4 * (inputs // 64) * row,
        )
    for panel in range(matrix.count):
        multiply_panel(kind, add, matrix, panel, rows, packed, scales, out + 128 * panel, 128 * matrix.count)


def product(
    kind: Kind,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weights.T + bias as the kernels compute it, added to *out* where there is one."""
    owned: list[torch.Tensor] = []
    matrix: npt.NDArray[Any] = lay_out(weights, bias, kind, owned)
    rows, inputs = x.shape
    packed = torch.zeros(rows * inputs * ELEMENT_BYTES[kind], dtype=torch.uint8)
    scales = torch.zeros(rows, inputs // GROUP + 1)
    made = torch.full((rows, int(matrix["count"][0]) * PANEL), 7.0)
    if out is not None:
        made[:, : len(weights)] = out
    x = x.contiguous()
    addresses = [tensor.data_ptr() for tensor in (packed, scales, made)]
    multiply(int(kind), out is not None, matrix[0], rows, x.data_ptr(), inputs, *addresses)
    return made[:, : len(weights)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 32), (5, 128, 50), (13, 576, 96), (27, 320, 33)]
)
def test_products_are_those_of_plain_torch(kind: Kind, rows: int, inputs: int, outputs: int) -> None:
    weights, bias, x = numbers(outputs, inputs), numbers(outputs, seed=1), numbers(rows, inputs, seed=2)
    before = numbers(rows, outputs, seed=3)
    expected = torch.nn.functional.linear(x.double(), weights.double(), bias.double())

    stored = product(kind, weights, bias, x)
    added = product(kind, weights, bias, x, before)

    assert (stored - expected).norm() <= TOLERANCE[kind] * expected.norm()
    assert torch.equal(added, stored + before)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(1, 40), seed=st.integers(0, 5))
def test_a_row_has_the_same_bits_in_any_batch(kind: Kind, rows: int, seed: int) -> None:
    """What exact resumption stands on."""
    weights, x = numbers(64, 128, seed=seed), numbers(rows, 128, seed=rows)

    together = product(kind, weights, None, x)

    for row in range(rows):
        assert torch.equal(product(kind, weights, None, x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_seen_in_its_row_and_in_no_other(kind: Kind, bad: float) -> None:
    """Rounded to eight bits it could pass for a number."""
    weights, x = numbers(64, 128), numbers(4, 128, seed=1)
    clean = product(kind, weights, None, x)
    x[2, 77] = bad

    spoilt = product(kind, weights, None, x)

    assert not spoilt[2].isfinite().any()
    assert torch.equal(spoilt[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.skipif(not machine.HAS_VNNI, reason="needs avx512_vnni")
def test_int8_takes_rows_of_zeros_and_of_any_size() -> None:
    weights = numbers(64, 128)
    x = torch.stack([torch.zeros(128), *(numbers(128, seed=1) * scale for scale in (1e-30, 1e-3, 1e3, 1e30))])
    expected = x.double() @ weights.double().T

    made = product(Kind.INT8, weights, None, x)

    assert not made[0].any()
    for row in range(1, 5):
        assert (made[row] - expected[row]).norm() <= TOLERANCE[Kind.INT8] * expected[row].norm()
