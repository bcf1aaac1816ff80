"""The benchmark of the host's time per step, with a few short sequences."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.host_time import StubDevice, describe, gpu_engine, measure


@pytest.mark.parametrize("ahead", [0, 1])
def test_each_full_decode_step_is_measured(ahead: int) -> None:
    spent = measure(StubDevice(describe(3, 80), ahead), 20)

    assert 10 < len(spent) <= 20, "the first and the last steps are not full"
    assert all(one.cpu > 0 and one.wall > 0 for one in spent)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_the_engine_of_a_gpu_is_measured_with_empty_graphs() -> None:
    assert len(measure(gpu_engine(describe(3, 80)), 20)) > 10
