"""Which instructions the kernels compile to. No device is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

# Prints the PTX of the variants of a module for each target, if their names match.
_SCRIPT = """
import json, re, sys
from headrace.worker.engine.gpu.kernels.report import compile_kernel, variants
module, wanted = sys.argv[1:]
for variant in variants(module):
    for target in variant.targets or (80, 90):
        if re.fullmatch(wanted, variant.name):
            print(json.dumps([variant.name, target, compile_kernel(variant, target).asm["ptx"]]))
"""


@dataclass(frozen=True)
class Compiled:
    """A compiled variant."""

    name: str
    target: int
    ptx: str


def compiled(module: str, wanted: str = ".*") -> list[Compiled]:
    """Compile the variants of a module whose names match, outside of the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _SCRIPT, module, wanted]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [Compiled(*json.loads(line)) for line in done.stdout.splitlines()]


def test_all_tiles_of_a_device_compile_to_the_same_instruction() -> None:
    """Another instruction may add in another order."""
    shape = re.compile(r"mma(?:_async)?\.sync\.aligned\.(m\d+n\d+k\d+)")

    found = {(variant.target, *sorted(set(shape.findall(variant.ptx)))) for variant in compiled("matmul")}

    with_tensor_cores = {(target, *shapes) for target, *shapes in found if shapes}
    assert with_tensor_cores == {(80, "m16n8k16"), (90, "m64n128k16")}


@pytest.mark.parametrize("name", ["decode, Llama 3 8B", "split decode, Qwen2.5 0.5B"])
def test_attention_loads_a_key_tile_while_it_computes_another(name: str) -> None:
    """A loop that waits for all of its copies, `wait_group 0`, has no copy in flight while it computes."""
    (variant,) = [variant for variant in compiled("attention", name) if variant.target == 90]

    loop = variant.ptx[: variant.ptx.index("mma.sync")]
    # Of each tile: keys, values and the block table for both.
    assert re.findall(r"cp\.async\.wait_group\s+(\d+)", loop)[-1] == "4"


@pytest.mark.parametrize("module", ["sampling", "likelihoods"])
def test_exact_arithmetic_compiles_to_instructions_that_round_as_on_a_cpu(module: str) -> None:
    """Each operation rounds once: none is fused or approximate, and small numbers are not replaced by 0.

    Other instructions, such as conversions and comparisons, are exact or have one result.
    """
    arithmetic = r"\b(?:add|sub|mul|div|fma|mad|rcp|sqrt|rsqrt)\.[a-z0-9.]*f(?:16|32|64)\b"
    inexact = r"[a-z0-9.]*\.(?:ftz|approx|full)[a-z0-9.]*"

    found = {
        name for variant in compiled(module) for name in re.findall(rf"{arithmetic}|{inexact}", variant.ptx)
    }

    assert found <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "mul.rn.f64"}
    assert {"add.rn.f32", "mul.rn.f32"} <= found
