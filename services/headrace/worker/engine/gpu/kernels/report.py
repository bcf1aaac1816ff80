"""Compile all kernels without a device, and report their registers, spills and shared memory.

    python -m headrace.worker.engine.gpu.kernels.report --target sm_90 --module attention --only decode

Exits with 1 if a variant does not compile, spills registers without permission, or needs more shared memory
than a program may use.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.worker.engine.gpu.kernels.tiling import shared_bytes
from headrace.worker.engine.gpu.kernels.variants import Variant

MODULES = (
    "attention",
    "store",
    "norms",
    "rotary",
    "activation",
    "matmul",
    "sampling",
    "likelihoods",
    "embedding",
    "tables",
)
TARGETS = ("sm_80", "sm_90")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled variant uses.

    registers   per thread, at most 255
    spills      bytes per thread that are stored to and loaded from memory because registers do not suffice
    shared      bytes of shared memory of a program
    refusal     why the variant is not acceptable; empty if it is
    """

    registers: int
    spills: int
    shared: int
    refusal: str = ""


def variants(module: str) -> list[Variant]:
    """Return the variants of a module of this package; none if there is no such module."""
    name = f"{__package__}.{module}"
    if importlib.util.find_spec(name) is None:
        return []
    found: list[Variant] = importlib.import_module(name).variants()
    return found


def compile_kernel(variant: Variant, capability: int) -> Any:
    """Compile a variant for a compute capability, such as 90, and return Triton's compiled kernel.

    Raises an error of Triton if it does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    unknown = set(names) ^ (set(variant.signature) | set(variant.constants))
    if unknown:
        raise ValueError(
            f"arguments of {variant.name} that do not match those of its kernel: {sorted(unknown)}"
        )
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in variant.aligned
    }
    return triton.compile(
        ASTSource(variant.kernel, signature, constexprs=dict(variant.constants), attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": variant.fp_fusion,
        },
    )


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile a variant for a compute capability, such as 90, and find out what it uses.

    Raises an error of Triton if it does not compile.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    compiled = compile_kernel(variant, capability)
    registers, spills = _registers(
        compiled.asm["ptx"],
        get_ptxas(capability).path,
        sm_arch_from_capability(capability),
        variant.fp_fusion,
    )
    shared = compiled.metadata.shared
    refusal = ""
    if spills and not variant.spills_allowed:
        refusal = "spills registers"
    elif shared > shared_bytes(capability):
        refusal = "needs too much shared memory"
    return Compiled(registers, spills, shared, refusal)


def _registers(ptx: str, ptxas: str, architecture: str, fp_fusion: bool) -> tuple[int, int]:
    """Assemble a kernel, and return its registers per thread and its bytes of spills per thread."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        fused = [] if fp_fusion else ["--fmad=false"]
        done = subprocess.run(
            [ptxas, "-v", *fused, f"--gpu-name={architecture}", str(source), "-o", f"{folder}/kernel.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    stores, loads = _numbers(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    (registers,) = _numbers(r"Used (\d+) registers", done.stderr)
    return registers, stores + loads


def _numbers(pattern: str, log: str) -> Sequence[int]:
    found = re.search(pattern, log)
    if found is None:
        raise ValueError(f"ptxas does not report {pattern!r}: {log}")
    return [int(number) for number in found.groups()]


def report(modules: Sequence[str], targets: Sequence[str], only: str = "") -> Iterator[tuple[str, bool]]:
    """Compile variants whose names contain *only*; yield lines of a table, and whether each is acceptable."""
    begin = f"{'variant':56} {'target':6} {'warps':>5} {'stages':>6}"
    yield f"{begin} {'registers':>9} {'spills':>6} {'shared':>7}", True
    for module in modules:
        for variant in variants(module):
            name = f"{module}: {variant.name}"
            for target in targets:
                capability = int(target.removeprefix("sm_"))
                if only in name and (not variant.targets or capability in variant.targets):
                    yield _line(name, target, variant, capability)


def _line(name: str, target: str, variant: Variant, capability: int) -> tuple[str, bool]:
    begin = f"{name:56} {target:6} {variant.num_warps:5} {variant.num_stages:6}"
    try:
        done = compile_variant(variant, capability)
    except Exception as raised:  # whatever Triton raises: the other variants are still reported
        error: BaseException = raised
        while error.__cause__ is not None:
            error = error.__cause__
        return f"{begin} does not compile: {error}", False
    notes = done.refusal or (variant.spills_allowed if done.spills else "")
    return f"{begin} {done.registers:9} {done.spills:6} {done.shared:7} {notes}".rstrip(), not done.refusal


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", default=TARGETS, metavar="sm_NN", help="what to compile for")
    parser.add_argument("--module", nargs="+", default=MODULES, choices=MODULES, help="modules of kernels")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose names contain this")
    options: Any = parser.parse_args(arguments)
    # Kernels that are decorated for the interpreter cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    acceptable = True
    for line, fine in report(options.module, options.target, options.only):
        print(line, flush=True)
        acceptable &= fine
    return 0 if acceptable else 1


if __name__ == "__main__":
    sys.exit(main())
