"""The first kernels of a step: ids, embeddings and their norms."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headrace.worker.engine.gpu.kernels.embedding import embed, resolve
from headrace.worker.engine.gpu.step_inputs import LATEST
from tests.worker.engine.gpu.device import DEVICE, DTYPES
from tests.worker.engine.gpu.kernels.numbers import close


@pytest.mark.parametrize("tokens", [1, 3, 256, 300])
def test_a_pending_token_is_the_latest_of_its_slot(tokens: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (tokens,), dtype=torch.int32)
    ids[::2] = LATEST
    slot_of = torch.randint(0, 9, (tokens,), dtype=torch.int32)
    latest = torch.randint(1000, 2000, (9,), dtype=torch.int32)

    seen = resolve(ids.to(DEVICE), slot_of.to(DEVICE), latest.to(DEVICE))

    assert seen.dtype is torch.int32
    assert torch.equal(seen.cpu(), torch.where(ids == LATEST, latest[slot_of.long()], ids))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 72])
@torch.inference_mode()
def test_tokens_are_looked_up_and_normalised(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(30, width).to(dtype)
    norm = LlamaRMSNorm(width, eps=1e-6).to(dtype)
    norm.weight.data = torch.randn(width).to(dtype)
    ids = torch.tensor([29, 0, 7, 7], dtype=torch.int32)

    residual, out = embed(ids.to(DEVICE), table.to(DEVICE), norm.weight.to(DEVICE), 1e-6)

    assert torch.equal(residual.cpu(), table[ids.long()])
    assert close(out, norm(table[ids.long()]))


def test_a_token_outside_the_vocabulary_does_not_read_outside_the_table() -> None:
    table = torch.randn(30, 16, device=DEVICE)
    ids = torch.tensor([-7, 30], dtype=torch.int32, device=DEVICE)

    residual, _ = embed(ids, table, torch.ones(16, device=DEVICE), 1e-6)

    assert torch.equal(residual, table[[0, 29]])
