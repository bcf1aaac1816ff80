"""Which instructions the kernels compile to. No device is needed."""

from __future__ import annotations

import os
import subprocess
import sys


def run(script: str) -> set[str]:
    """Run a script that compiles, outside of the interpreter. Returns the lines that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines())


def test_all_tiles_of_a_device_compile_to_the_same_instruction() -> None:
    """Another instruction may add in another order."""
    script = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from headrace.worker.engine.gpu.kernels import matmul
for variant in matmul.variants():
    for target in variant.targets:
        names = variant.kernel.arg_names
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                   if name in variant.aligned or variant.signature.get(name, "").startswith("*")}
        signature = {name: variant.signature.get(name, "constexpr") for name in names}
        source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=aligned)
        options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages, enable_fp_fusion=True)
        ptx = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["ptx"]
        shapes = set(re.findall(r"mma(?:_async)?\\.sync\\.aligned\\.(m\\d+n\\d+k\\d+)", ptx))
        print(target, *sorted(shapes))
"""

    assert run(script) == {"80 m16n8k16", "90 m64n128k16"}


def test_attention_loads_a_key_tile_while_it_computes_another() -> None:
    """A loop that waits for all of its copies, `wait_group 0`, has no copy in flight while it computes."""
    script = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from headrace.worker.engine.gpu.kernels import attention
for variant in attention.variants():
    if variant.name in ("decode, Llama 3 8B", "split decode, Qwen2.5 0.5B") and 90 in variant.targets:
        names = variant.kernel.arg_names
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                   if name in variant.aligned or variant.signature.get(name, "").startswith("*")}
        signature = {name: variant.signature.get(name, "constexpr") for name in names}
        source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=aligned)
        options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages, enable_fp_fusion=False)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        loop = ptx[: ptx.index("mma.sync")]
        print(variant.name, re.findall(r"cp\\.async\\.wait_group\\s+(\\d+)", loop)[-1])
"""
    # Of each tile: keys, values and the block table for both.
    assert run(script) == {"decode, Llama 3 8B 4", "split decode, Qwen2.5 0.5B 4"}
