"""The kernel that writes keys and values to paged memory."""

from __future__ import annotations

import pytest
import torch

from headrace.worker.engine.gpu.kernels.store import store
from tests.worker.engine.gpu.device import DEVICE

_DIMS = [(1, 16, 16), (3, 24, 24), (2, 72, 80), (5, 192, 128), (40, 64, 64)]
_ORDERS = [(0, 1, 2), (1, 0, 2), (2, 0, 1)]


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "key_dim", "value_dim", "order"),
    [
        *((torch.bfloat16, *dims, _ORDERS[0]) for dims in _DIMS),
        *((dtype, 3, 24, 40, order) for dtype in (torch.float32, torch.bfloat16) for order in _ORDERS),
    ],
)
def test_keys_and_values_of_any_strides_are_written_to_their_places_only(
    dtype: torch.dtype, kv_heads: int, key_dim: int, value_dim: int, order: tuple[int, int, int]
) -> None:
    back = [order.index(dim) for dim in range(3)]
    keys, values = (
        torch.randn(3, kv_heads, dim).to(DEVICE, dtype).permute(order).contiguous().permute(back)
        for dim in (key_dim, value_dim)
    )
    pages = [
        torch.full((2, 4, kv_heads, dim), 9.0, dtype=dtype, device=DEVICE) for dim in (key_dim, value_dim)
    ]
    where = [6, 0, 3]

    key_pages, value_pages = pages
    store(keys, values, key_pages, value_pages, torch.tensor(where, dtype=torch.int32, device=DEVICE))

    for page, new in zip(pages, (keys, values), strict=True):
        expected = torch.full_like(page, 9.0)
        expected.view(8, kv_heads, -1)[where] = new
        assert torch.equal(page, expected)
