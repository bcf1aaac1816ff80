"""The attention kernels compile without a device and without spills.

It takes a second per variant, so not all are tested: `python -m headrace.worker.engine.gpu.kernels.report`
compiles the others, which differ little from these.
"""

from __future__ import annotations

from tests.worker.engine.gpu.kernels.compiling import compiled


def test_all_kinds_of_attention_of_a_model_compile_for_all_targets() -> None:
    lines = compiled("--module", "attention", "--only", "Llama 3 8B")

    (split,) = (line for line in lines if "split decode" in line and "sm_90" in line)
    registers, _, shared = map(int, split.split()[-3:])
    assert 32 <= registers <= 255
    assert shared > 32 * 1024


def test_attention_of_all_models_compiles() -> None:
    """Decodes have the tiles of exact mixed steps."""
    lines = compiled("--module", "attention", "--only", "mixed", "--target", "sm_90")

    assert len(lines) > 20
