"""The activation of gated feed-forward networks compared with torch."""

from __future__ import annotations

import pytest
import torch

from headrace.worker.engine.gpu.kernels.activation import silu_multiply


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [24, 1024, 1100])
def test_gates_are_activated_and_multiplied(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(3, 2 * width) * 4).to(dtype)
    gate_up[0, :2] = torch.tensor([-100.0, 100.0])  # the exponential overflows
    out = torch.empty(3, width, dtype=dtype)

    silu_multiply(gate_up, out)

    gate, up = gate_up.chunk(2, dim=1)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)
