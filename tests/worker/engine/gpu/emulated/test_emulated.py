"""Kernels that are compiled for a GPU compute on the CPU, in an emulator, what their tests expect.

Some of the tests that Triton's interpreter runs, in bfloat16, which it cannot multiply. `make gpu-emulation`
runs all.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.worker.engine.gpu.device import HAS_CUDA

GPU = "tests/worker/engine/gpu"
KERNELS = f"{GPU}/kernels"

# A process each: the plugin comes before triton. An argument that names no test is an error.
RUNS = {
    "the emulator": [f"{GPU}/emulated/emulator_cases.py"],
    "sampling": [
        f"{GPU}/test_sampler.py::test_all_kinds_of_parameters_sample_the_tokens_of_the_cpu[8-1]",
        f"{GPU}/test_sampler.py::test_filters_keep_the_tokens_of_their_definition[16-True]",
        f"{GPU}/test_likelihoods.py::test_the_device_finds_the_same_bits[131-64-dtype2]",  # bfloat16
    ],
    "other kernels": [
        *(f"{KERNELS}/test_{name}.py" for name in ("activation", "embedding", "norms", "rotary", "store")),
        f"{KERNELS}/test_matmul.py::test_products_are_those_of_double_precision",
        f"{KERNELS}/test_matmul.py::test_a_row_has_the_same_bits_alone_among_many_and_in_any_place",
        f"{KERNELS}/test_attention.py::test_decodes_attend_to_all_keys_on_either_side_of_each_border",
        f"{KERNELS}/test_attention.py::test_chunks_of_rows_attend_to_earlier_tokens_only",
        f"{KERNELS}/test_attention.py::test_the_largest_query_tiles_of_mixed_steps_attend_alike",
        "-k", "(bfloat16 or pending or outside or largest) and not 1056",
    ],
}  # fmt: skip


@pytest.mark.skipif(HAS_CUDA, reason="the GPU runs the kernels")
@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS)
def test_compiled_kernels_compute_what_their_tests_expect(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]

    done = subprocess.run(
        [*command, "-p", "tests.worker.engine.gpu.ptx.plugin", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-5_000:]
    assert " passed" in done.stdout
