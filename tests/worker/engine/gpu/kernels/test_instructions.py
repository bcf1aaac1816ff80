"""Which instructions the kernels compile to. No device is needed."""

from __future__ import annotations

import os
import subprocess
import sys


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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )

    assert set(compiled.stdout.splitlines()) == {"80 m16n8k16", "90 m64n128k16"}
