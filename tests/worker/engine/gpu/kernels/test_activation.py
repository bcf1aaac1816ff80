"""The activation of gated feed-forward networks compared with torch."""

from __future__ import annotations

import pytest
import torch

from headrace.worker.engine.gpu.kernels.activation import silu_multiply
from tests.worker.engine.gpu.device import DEVICE, DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 1024, 1100])
def test_gates_are_activated_and_multiplied(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(3, 2 * width) * 4).to(dtype)
    gate_up[0, :2] = torch.tensor([-100.0, 100.0])  # the exponential overflows
    out = torch.empty(3, width, dtype=dtype, device=DEVICE)

    silu_multiply(gate_up.to(DEVICE), out)

    gate, up = gate_up.chunk(2, dim=1)
    torch.testing.assert_close(out.cpu(), torch.nn.functional.silu(gate) * up)
