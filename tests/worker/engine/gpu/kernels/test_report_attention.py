"""The attention kernels compile without a device, and without spills that are not allowed by name."""

from __future__ import annotations

from tests.worker.engine.gpu.kernels.compiling import compiled


def test_all_attention_compiles_for_all_targets() -> None:
    lines = compiled("--module", "attention")

    (split,) = (line for line in lines if "split decode, Llama 3 8B" in line and "sm_90" in line)
    registers, _, shared = map(int, split.split()[-3:])
    assert 32 <= registers <= 255
    assert shared > 32 * 1024
