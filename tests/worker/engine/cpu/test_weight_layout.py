"""Laying out weights: in chunks, from one matrix or several, always the same bytes."""

import pytest
import torch

from headrace.worker.engine.cpu import weight_layout
from headrace.worker.engine.cpu.kernels.matmul import ElementType
from headrace.worker.engine.cpu.weight_layout import lay_out


def laid_out(weights: list[torch.Tensor], element_type: ElementType) -> list[bytes]:
    owned: list[torch.Tensor] = []
    lay_out(weights, None, element_type, owned)
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in owned]


@pytest.mark.parametrize("element_type", ElementType)
@pytest.mark.parametrize("cuts", [(96,), (77, 128), (1, 2, 3, 200)])
def test_stacked_matrices_are_laid_out_as_one(element_type: ElementType, cuts: tuple[int, ...]) -> None:
    whole = torch.randn(250, 128)

    parts = list(whole.tensor_split(cuts))

    assert laid_out(parts, element_type) == laid_out([whole], element_type)


@pytest.mark.parametrize("element_type", ElementType)
def test_the_size_of_a_chunk_does_not_matter(
    element_type: ElementType, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randn(250, 128)
    at_once = laid_out([whole], element_type)

    monkeypatch.setattr(weight_layout, "_CHUNK_WEIGHTS", 64 * 128)

    assert laid_out([whole], element_type) == at_once


def test_a_row_of_zeros_is_quantised_to_zeros() -> None:
    owned: list[torch.Tensor] = []

    lay_out([torch.zeros(1, 64)], None, ElementType.INT8, owned)

    _, panels, scales = owned
    assert not panels.any()
    assert torch.isfinite(scales).all()
