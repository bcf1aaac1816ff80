"""Packed layers compute the same as plain ones, and are batch-invariant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from headrace.worker.engine.cpu.packing import MIN_TOKENS, PackedLinear, pack_linears

DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            reason="oneDNN has no bfloat16 here",
        ),
    ),
]


class Block(nn.Module):
    """Layers with the names of most models."""

    def __init__(self, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        self.dtype = dtype
        self.q_proj = nn.Linear(96, 64, bias=bias)
        self.k_proj = nn.Linear(96, 32, bias=bias)
        self.v_proj = nn.Linear(96, 32, bias=bias)
        self.gate_proj = nn.Linear(96, 200, bias=False)
        self.up_proj = nn.Linear(96, 200, bias=False)
        self.down_proj = nn.Linear(200, 96, bias=False)
        self.to(dtype)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        mixed = torch.cat([self.q_proj(rows), self.k_proj(rows), self.v_proj(rows)], dim=-1)
        out: torch.Tensor = mixed[..., :96] + self.down_proj(self.gate_proj(rows) * self.up_proj(rows))
        return out


def networks(dtype: torch.dtype, *, bias: bool) -> tuple[Block, Block]:
    """Return the same network twice: plain and packed."""
    torch.manual_seed(0)
    plain = Block(dtype, bias=bias)
    packed = Block(dtype, bias=bias)
    packed.load_state_dict(plain.state_dict())
    assert pack_linears(packed)
    return plain, packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_packed_network_computes_the_same_as_a_plain_one(dtype: torch.dtype, bias: bool) -> None:
    plain, packed = networks(dtype, bias=bias)
    for rows in (1, 2, 5, 33):
        given = torch.randn(1, rows, 96).to(dtype)
        expected, got = plain(given).float(), packed(given).float()

        assert (got - expected).norm() <= (1e-5 if dtype is torch.float32 else 2e-2) * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_row_is_bit_identical_in_any_batch(dtype: torch.dtype) -> None:
    _, packed = networks(dtype, bias=True)
    given = torch.randn(1, 64, 96).to(dtype)
    whole = packed(given)

    for rows in range(MIN_TOKENS[dtype], 64):
        assert torch.equal(packed(given[:, :rows].contiguous()), whole[:, :rows])


@torch.inference_mode()
def test_layers_that_share_a_computation_do_not_mix_up_inputs() -> None:
    """Even if a caller stops half way, or calls in another order."""
    plain, packed = networks(torch.float32, bias=False)
    first, second = torch.randn(1, 3, 96), torch.randn(1, 3, 96)
    packed.q_proj(first)  # and never calls the others

    for name in ("v_proj", "q_proj", "k_proj"):
        for rows in (second, first):
            expected = getattr(plain, name)(rows)
            torch.testing.assert_close(getattr(packed, name)(rows), expected)


@torch.inference_mode()
def test_shared_results_are_released_after_the_last_layer() -> None:
    _, packed = networks(torch.float32, bias=False)
    packed(torch.randn(1, 3, 96))
    shared: Any = packed.q_proj

    assert shared._shared._rows is None
    assert shared._shared._out is None


def test_layers_of_subclasses_are_kept_and_reported() -> None:
    class Special(nn.Linear):
        """May compute something else."""

    network = Block(torch.float32, bias=False)
    network.down_proj = Special(200, 96, bias=False)

    assert not pack_linears(network)
    assert type(network.down_proj) is Special


def test_float16_uses_plain_layers() -> None:
    network = Block(torch.float16, bias=False)

    assert not pack_linears(network)
    assert type(network.q_proj) is nn.Linear


def test_results_of_packed_layers_are_concatenated() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(8, 3), nn.Linear(8, 5)
    rows = torch.randn(4, 8)
    with torch.inference_mode():
        both = PackedLinear(one, two)(rows)

        torch.testing.assert_close(both, torch.cat([one(rows), two(rows)], dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_packed_layer_has_weights_and_biases(dtype: torch.dtype, bias: bool) -> None:
    """Some models also read them: for the dtype of a router, or for their own product."""
    plain, packed = networks(dtype, bias=bias)

    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"):
        mine: Any = getattr(packed, name)
        other = getattr(plain, name)
        assert torch.equal(mine.weight, other.weight)
        assert mine.weight.dtype is dtype
        assert (mine.bias is None) == (other.bias is None)
        assert mine.bias is None or torch.equal(mine.bias, other.bias)
        assert (mine.in_features, mine.out_features) == (other.in_features, other.out_features)


@torch.inference_mode()
def test_layers_with_another_dtype_than_the_network_are_packed_separately_or_kept() -> None:
    """A router may be float32 in a bfloat16 network, for its rounding."""
    plain, packed = Block(torch.float32, bias=False), Block(torch.float32, bias=False)
    for block in (plain, packed):
        block.up_proj.to(torch.bfloat16)
        block.down_proj.to(torch.float64)
    packed.load_state_dict(plain.state_dict())

    pack_linears(packed)

    for name, dtype in (
        ("gate_proj", torch.float32),
        ("up_proj", torch.bfloat16),
        ("down_proj", torch.float64),
    ):
        rows = torch.randn(3, getattr(plain, name).in_features).to(dtype)
        mine, expected = getattr(packed, name)(rows), getattr(plain, name)(rows)
        assert mine.dtype is dtype
        assert torch.allclose(mine.double(), expected.double(), atol=1e-2)
