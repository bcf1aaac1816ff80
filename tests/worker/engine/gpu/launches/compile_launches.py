"""Compile launches that `fake_cuda.Recorder` has recorded: `python -m ... sm_90 < launches.json`.

A process of its own, because kernels that are decorated for the interpreter cannot be compiled. Prints what
is not acceptable, and exits with the number of such launches.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any


def refusal(launch: dict[str, Any], capability: int) -> str:
    """Compile a launch. Returns why it is not acceptable, or an empty string."""
    from headrace.worker.engine.gpu.kernels.report import compile_variant
    from headrace.worker.engine.gpu.kernels.variants import Variant

    options = dict(launch["options"])
    variant = Variant(
        name=launch["kernel"],
        kernel=getattr(import_module(launch["module"]), launch["kernel"]),
        signature=dict(launch["signature"]),
        constants=dict(launch["constants"]),
        num_warps=options.get("num_warps", 4),
        num_stages=options.get("num_stages", 3),
        fp_fusion=options["enable_fp_fusion"],
        aligned=frozenset(launch["aligned"]),
        spills_allowed="`kernels.report` judges those of real models",
    )
    try:
        return compile_variant(variant, capability).refusal
    except Exception as raised:  # whatever Triton raises: the other launches are still compiled
        error: BaseException = raised
        while error.__cause__ is not None:
            error = error.__cause__
        return f"does not compile: {type(error).__name__}: {error}"


def main() -> int:
    """Compile what standard input lists."""
    os.environ.pop("TRITON_INTERPRET", None)
    capability = int(sys.argv[1].removeprefix("sm_"))
    refused = 0
    for launch in json.load(sys.stdin):
        if reason := refusal(launch, capability):
            refused += 1
            print(f"{launch}: {reason}", flush=True)
    return refused


if __name__ == "__main__":
    sys.exit(main())
