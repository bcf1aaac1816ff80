"""What `benchmarks.gpu.interpreter` changes of Triton's interpreter does not change what kernels compute."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.worker.engine.gpu.device import DEVICE, EMULATED, HAS_CUDA

pytestmark = pytest.mark.skipif(HAS_CUDA or EMULATED, reason="the interpreter is not used")


@triton.jit  # type: ignore[untyped-decorator]
def _doubled(numbers: tl.tensor) -> tl.tensor:
    return numbers + tl.where(numbers == numbers, numbers, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_of_doubled(x: tl.tensor, out: tl.tensor, size: tl.constexpr) -> None:
    numbers = tl.load(x + tl.arange(0, size))
    tl.store(out + tl.program_id(0), tl.sum(_doubled(_doubled(numbers))))


def test_launches_call_device_functions_and_leave_the_language_as_it_was() -> None:
    load, where = tl.load, tl.where
    out = torch.zeros(3, device=DEVICE)

    for size in (4, 8):
        _sum_of_doubled[(3,)](torch.arange(8.0, device=DEVICE), out, size=size)

        assert out.tolist() == [4.0 * sum(range(size))] * 3
        assert (tl.load, tl.where) == (load, where)
