"""The activation of gated feed-forward networks: SiLU(gate) x up (Shazeer, GLU Variants, 2020)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.worker.engine.gpu.kernels.variants import Variant

_BLOCK = 1024  # numbers per program: 16 bytes per thread of four warps in the half formats


@triton.jit
def _silu_multiply(gate_up: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    source = gate_up + token * (2 * WIDTH) + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0)
    power = tl.exp(-tl.abs(gate))  # at most 1, so that it cannot overflow
    activated = gate * tl.where(gate < 0, power, 1.0) / (1.0 + power)
    activated = activated.to(up.dtype)  # rounded as transformers does
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out + token * WIDTH + columns, product, mask=inside)


def silu_multiply(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Compute SiLU(gate) x up.

    gate_up   [tokens, 2 x width], contiguous: the gates, then the factors
    out       [tokens, width], contiguous
    """
    tokens, width = out.shape
    grid = (tokens, triton.cdiv(width, _BLOCK))
    _silu_multiply[grid](gate_up, out, WIDTH=width, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True)


def variants() -> list[Variant]:
    """Return how real models use the kernels of this module."""
    return [
        Variant(
            name=f"feed-forward size {width}",
            kernel=_silu_multiply,
            signature={"gate_up": "*bf16", "out": "*bf16"},
            constants={"WIDTH": width, "BLOCK": _BLOCK},
        )
        for width in (4864, 14336)
    ]
