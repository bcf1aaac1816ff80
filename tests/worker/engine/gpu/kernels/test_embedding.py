"""The first kernels of a step: ids, embeddings and their norms."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headrace.worker.engine.gpu.kernels.embedding import embed, resolve
from headrace.worker.engine.gpu.step_inputs import LATEST


@pytest.mark.parametrize("tokens", [1, 3, 256, 300])
def test_a_pending_token_is_the_latest_of_its_slot(tokens: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (tokens,), dtype=torch.int32)
    ids[::2] = LATEST
    slot_of = torch.randint(0, 9, (tokens,), dtype=torch.int32)
    latest = torch.randint(1000, 2000, (9,), dtype=torch.int32)

    seen = resolve(ids, slot_of, latest)

    assert seen.dtype is torch.int32
    assert torch.equal(seen, torch.where(ids == LATEST, latest[slot_of.long()], ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [16, 72])
@torch.inference_mode()
def test_tokens_are_looked_up_and_normalised(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(30, width).to(dtype)
    norm = LlamaRMSNorm(width, eps=1e-6).to(dtype)
    norm.weight.data = torch.randn(width).to(dtype)
    ids = torch.tensor([29, 0, 7, 7], dtype=torch.int32)

    residual, out = embed(ids, table, norm.weight, 1e-6)

    assert torch.equal(residual, table[ids.long()])
    torch.testing.assert_close(out, norm(residual))


def test_a_token_outside_the_vocabulary_does_not_read_outside_the_table() -> None:
    table = torch.randn(30, 16)

    residual, _ = embed(torch.tensor([-7, 30], dtype=torch.int32), table, torch.ones(16), 1e-6)

    assert torch.equal(residual, table[[0, 29]])
