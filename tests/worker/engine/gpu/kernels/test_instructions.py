"""Which instructions the kernels compile to. No device is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

# Prints for each variant of some modules: the target, and what a pattern finds in its PTX.
_SCRIPT = """
import importlib, re, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
pattern, *modules = sys.argv[1:]
for module in modules:
    for variant in importlib.import_module("headrace.worker.engine.gpu.kernels." + module).variants():
        for target in variant.targets or (80, 90):
            names = variant.kernel.arg_names
            aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                       if name in variant.aligned or variant.signature.get(name, "").startswith("*")}
            signature = {name: variant.signature.get(name, "constexpr") for name in names}
            source = ASTSource(variant.kernel, signature, constexprs=dict(variant.constants), attrs=aligned)
            options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages,
                           enable_fp_fusion=variant.fp_fusion)
            ptx = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["ptx"]
            print(target, *sorted(set(re.findall(pattern, ptx))))
"""


def found_in_ptx(pattern: str, modules: Sequence[str]) -> list[list[str]]:
    """Return for each variant of modules: its target, and the different texts that a pattern finds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _SCRIPT, pattern, *modules]
    compiled = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [line.split() for line in compiled.stdout.splitlines()]


def test_all_tiles_of_a_device_compile_to_the_same_instruction() -> None:
    """Another instruction may add in another order."""
    found = found_in_ptx(r"mma(?:_async)?\.sync\.aligned\.(m\d+n\d+k\d+)", ["matmul"])

    with_tensor_cores = {(target, *shapes) for target, *shapes in found if shapes}
    assert with_tensor_cores == {("80", "m16n8k16"), ("90", "m64n128k16")}


@pytest.mark.parametrize("module", ["sampling", "likelihoods"])
def test_exact_arithmetic_compiles_to_instructions_that_round_as_on_a_cpu(module: str) -> None:
    """Each operation rounds once: none is fused or approximate, and small numbers are not replaced by 0.

    Other instructions, such as conversions and comparisons, are exact or have one result.
    """
    arithmetic = r"\b(?:add|sub|mul|div|fma|mad|rcp|sqrt|rsqrt)\.[a-z0-9.]*f(?:16|32|64)\b"
    found = found_in_ptx(rf"{arithmetic}|[a-z0-9.]*\.(?:ftz|approx|full)[a-z0-9.]*", [module])

    instructions = {name for _, *names in found for name in names}
    assert instructions <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "mul.rn.f64"}
    assert {"add.rn.f32", "mul.rn.f32"} <= instructions
