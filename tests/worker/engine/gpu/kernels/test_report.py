"""The kernels compile without a device, and the report refuses those that spill registers."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

from headrace.worker.engine.gpu import kernels
from headrace.worker.engine.gpu.kernels.report import MODULES
from tests.worker.engine.gpu.kernels.compiling import compiled


def test_all_kernels_compile_without_a_device_and_without_spills() -> None:
    """Prints the table of registers if one does not. `test_report_attention` compiles attention."""
    others = [module for module in MODULES if module != "attention"]

    lines = compiled("--module", *others)

    assert {line.split(":")[0] for line in lines} == set(others)


def test_every_module_with_kernels_is_in_the_report() -> None:
    """What the interpreter accepts may not compile."""
    found = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    with_variants = {
        name for name in found if hasattr(importlib.import_module(f"{kernels.__name__}.{name}"), "variants")
    }

    assert with_variants - {"report"} == set(MODULES)


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
