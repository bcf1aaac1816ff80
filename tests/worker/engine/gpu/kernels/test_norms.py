"""The norm kernels compared with the norms of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headrace.worker.engine.gpu.kernels.norms import add_norm, add_norm_of
from tests.worker.engine.gpu.device import DEVICE, DTYPES
from tests.worker.engine.gpu.kernels.numbers import close

EPSILON = 1e-5


def norm_of(width: int, dtype: torch.dtype) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, eps=EPSILON).to(dtype)
    norm.weight.data = torch.randn(width).to(dtype)
    return norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 96, 1000])
@torch.inference_mode()
def test_the_sum_is_kept_and_its_norm_returned(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    added, residual = (torch.randn(5, width).to(dtype) for _ in range(2))
    norm = norm_of(width, dtype)
    total = added + residual
    kept = residual.to(DEVICE)
    out = torch.empty_like(kept)

    add_norm(added.to(DEVICE), kept, norm.weight.to(DEVICE), EPSILON, out)

    assert torch.equal(kept.cpu(), total)
    assert close(out, norm(total))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_the_norms_of_some_rows_leave_the_residual_as_it_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    added, residual = (torch.randn(6, 48).to(dtype) for _ in range(2))
    norm, before = norm_of(48, dtype), residual.to(DEVICE)
    kept = torch.tensor([5, 0, 0, 3], dtype=torch.int32)

    out = add_norm_of(kept.to(DEVICE), added.to(DEVICE), before, norm.weight.to(DEVICE), EPSILON)

    assert torch.equal(before.cpu(), residual)
    assert close(out, norm(added + residual)[kept.long()])


@torch.inference_mode()
def test_a_row_with_nan_does_not_affect_others() -> None:
    torch.manual_seed(0)
    added, residual = (torch.randn(3, 48, device=DEVICE) for _ in range(2))
    weights = torch.randn(48, device=DEVICE)
    out, poisoned = torch.empty_like(residual), torch.empty_like(residual)
    add_norm(added, residual.clone(), weights, EPSILON, out)
    added[1, 7] = float("nan")

    add_norm(added, residual.clone(), weights, EPSILON, poisoned)

    assert torch.equal(poisoned[[0, 2]], out[[0, 2]])
    assert poisoned[1].isnan().all()
