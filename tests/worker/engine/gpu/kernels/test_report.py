"""The kernels compile without a device, and the report refuses those that spill registers."""

from __future__ import annotations

import subprocess
import sys

import pytest


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the report in a process of its own: kernels of this process may be interpreted."""
    command = [sys.executable, "-m", "headrace.worker.engine.gpu.kernels.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_attention_compiles_without_a_device_and_without_spills(target: str) -> None:
    done = report(
        "--target", target, "--module", "attention", "--only", "attention: split decode, Llama 3 8B"
    )

    assert done.returncode == 0, done.stdout + done.stderr
    header, line = done.stdout.splitlines()
    assert header.split()[-3:] == ["registers", "spills", "shared"]
    registers, spills, shared = map(int, line.split()[-3:])
    assert 32 <= registers <= 255
    assert spills == 0
    assert shared > 32 * 1024


def test_a_program_that_does_not_fit_into_registers_is_refused() -> None:
    code = """
import dataclasses, os, sys
os.environ.pop("TRITON_INTERPRET", None)
from headrace.worker.engine.gpu.kernels import attention, report

(fine,) = [v for v in attention.variants() if v.name == "fast mixed, Llama 3 8B" and 90 in v.targets]
one_warp = dataclasses.replace(fine, num_warps=1, targets=())
allowed = dataclasses.replace(one_warp, name="allowed", spills_allowed="for this test")
broken = dataclasses.replace(fine, name="broken", constants={})
report.variants = lambda module: [one_warp, allowed, broken]
sys.exit(report.main(["--target", "sm_90", "--module", "attention"]))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1, done.stderr
    _, spilling, allowed, broken = done.stdout.splitlines()
    assert spilling.endswith("spills registers")
    assert allowed.endswith("for this test")
    assert "does not compile: arguments of broken that do not match" in broken
