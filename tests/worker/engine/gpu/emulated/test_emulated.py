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

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="the GPU runs the kernels")


def emulate(*arguments: str) -> None:
    """Run tests in a process of their own, with the plugin, which must be there before triton is imported.

    Fails if one fails or if there is none.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "tests.worker.engine.gpu.ptx.plugin", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-5_000:]
    assert " passed" in done.stdout


def test_the_emulator_computes_and_finds_faults() -> None:
    emulate(f"{GPU}/emulated/emulator_cases.py")


def test_compiled_samplers_give_the_tokens_and_likelihoods_of_a_cpu() -> None:
    emulate(
        f"{GPU}/test_sampler.py::test_all_kinds_of_parameters_sample_the_tokens_of_the_cpu[8-1]",
        f"{GPU}/test_sampler.py::test_filters_keep_the_tokens_of_their_definition[16-True]",
        f"{GPU}/test_likelihoods.py::test_the_device_finds_the_same_bits[131-64-dtype2]",  # bfloat16
    )


def test_compiled_attention_attends_as_its_tests_expect() -> None:
    emulate(
        f"{KERNELS}/test_attention.py::test_decodes_attend_to_all_keys_on_either_side_of_each_border",
        f"{KERNELS}/test_attention.py::test_chunks_of_rows_attend_to_earlier_tokens_only",
        f"{KERNELS}/test_attention.py::test_the_largest_query_tiles_of_mixed_steps_attend_alike",
        "-k", "largest or (bfloat16 and not 5-True and not 5-False)",
    )  # fmt: skip


def test_other_compiled_kernels_compute_what_their_tests_expect() -> None:
    emulate(
        *(f"{KERNELS}/test_{name}.py" for name in ("activation", "embedding", "norms", "rotary", "store")),
        f"{KERNELS}/test_matmul.py::test_products_are_those_of_double_precision",
        f"{KERNELS}/test_matmul.py::test_a_row_has_the_same_bits_alone_among_many_and_in_any_place",
        "-k", "(bfloat16 or pending or outside) and not (1056 or 2112-False)",
    )  # fmt: skip
