"""Find which matrix products give a row the same bits in batches of any size, and what exact mode costs.

cuBLAS chooses its algorithm by the whole shape, so a row can be rounded differently in a larger batch. It is
measured as it is, and with what is said to keep it from splitting the depth (in a process of its own, because
cuBLAS reads its variables once), beside our own kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch

from benchmarks.gpu import engines, limits
from benchmarks.gpu.parts import decode, workload
from benchmarks.gpu.report import Report
from benchmarks.gpu.requests import workload as requests_of
from benchmarks.gpu.shapes import SHAPES, Shape
from benchmarks.gpu.timing import seconds_of

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 24, 32, 33, 64, 96, 128, 192, 256, 257, 512, 1024, 2048)
_TINY_SIZES = (1, 3, 17, 64, 65)
_TIMED = (1, 32, 256, 2048)
_RUNS = 50  # of each product with most rows, which must give the same bits
# Of different depths, for each of which our kernel is compiled.
_PRODUCTS = (("llama-3-8b", "gate_up"), ("llama-3-8b", "down"), ("qwen2.5-0.5b", "gate_up"))
# As in vLLM's batch-invariant mode.
_WITHOUT_SPLITS = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def run(report: Report, shape: Shape | None) -> None:
    """Measure products if there is no model, else the model in exact mode."""
    if shape is None:
        _products(report)
    else:
        _engine(report, shape)


def _products(report: Report) -> None:
    from headrace.worker.engine.gpu.kernels.matmul import matmul

    options = report.options
    sizes = _TINY_SIZES if options.rehearse else SIZES
    device, tiny = options.device, options.rehearse
    ours = _compared(matmul, device, tiny=tiny)
    _show(report, "our kernel", ours, sizes)
    repeated = _repeated(matmul, device, tiny=tiny)
    report.row(
        "our kernel: runs with the bits of the first",
        repeated,
        f"of {_RUNS}",
        note="Triton 3.6 has no fence between copies and wgmma (triton-lang/triton#9610)",
    )
    _show(report, "cuBLAS", _compared(torch.nn.functional.linear, device, tiny=tiny), sizes)
    _without_splits(report, sizes)
    if any(ours.values()):
        raise RuntimeError(f"our product depends on the number of rows: {ours}")
    if repeated < _RUNS:
        raise RuntimeError("our product does not give the same bits each time; a newer Triton may")
    _time(report, matmul)


def _without_splits(report: Report, sizes: Sequence[int]) -> None:
    asked = json.dumps([report.options.device, report.options.rehearse])
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.parts.exact", asked],
        env={**os.environ, **_WITHOUT_SPLITS},
        capture_output=True,
        text=True,
        check=False,
        timeout=max(report.left, 5),
    )
    if found.returncode:
        report.row("cuBLAS without splits", note=f"failed: {found.stderr.strip().splitlines()[-1:]}")
    else:
        _show(report, "cuBLAS without splits", json.loads(found.stdout.splitlines()[-1]), sizes)


def _compared(product: Product, device: str, *, tiny: bool) -> dict[str, list[int]]:
    """Return, per product of the models, the numbers of rows at which any row differs from the largest."""
    sizes = _TINY_SIZES if tiny else SIZES
    found = {}
    with torch.inference_mode():
        for name, outputs, inputs in _shapes(tiny=tiny):
            x, weights = _operands(sizes[-1], outputs, inputs, device, tiny=tiny)
            whole = product(x, weights)
            found[name] = [
                rows for rows in sizes if not torch.equal(product(x[:rows], weights), whole[:rows])
            ]
    return found


def _repeated(product: Product, device: str, *, tiny: bool) -> int:
    """Return in how many of `_RUNS` runs each product of most rows had the bits of the first run."""
    equal = [True] * _RUNS
    with torch.inference_mode():
        for _, outputs, inputs in _shapes(tiny=tiny):
            x, weights = _operands((_TINY_SIZES if tiny else SIZES)[-1], outputs, inputs, device, tiny=tiny)
            first = product(x, weights)
            for run in range(_RUNS):
                equal[run] &= torch.equal(product(x, weights), first)
    return sum(equal)


def _shapes(*, tiny: bool) -> list[tuple[str, int, int]]:
    if tiny:
        return [("tiny", 48, 80)]
    return [
        (f"{model} {name}", outputs, inputs)
        for model, chosen in _PRODUCTS
        for name, outputs, inputs in SHAPES[model].products
        if name == chosen
    ]


def _operands(
    rows: int, outputs: int, inputs: int, device: str, *, tiny: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float32 if tiny else torch.bfloat16
    random = torch.Generator(device).manual_seed(3)
    x = torch.randn(rows, inputs, generator=random, device=device, dtype=dtype)
    return x, 0.02 * torch.randn(outputs, inputs, generator=random, device=device, dtype=dtype)


def _show(report: Report, what: str, found: dict[str, list[int]], sizes: Sequence[int]) -> None:
    differing = sorted({rows for own in found.values() for rows in own})
    report.row(
        f"{what}: numbers of rows with the bits of {sizes[-1]} rows",
        len(sizes) - len(differing),
        f"of {len(sizes)}",
        note="; ".join(f"{name} differs at {own}" for name, own in found.items() if own) or "all are equal",
    )


def _time(report: Report, matmul: Product) -> None:
    """Time our kernel beside cuBLAS."""
    tiny = report.options.rehearse
    device = torch.device(report.options.device)
    with torch.inference_mode():
        for name, outputs, inputs in _shapes(tiny=tiny):
            for rows in (1,) if tiny else _TIMED:
                if report.left < 3:
                    return
                x, weights = _operands(rows, outputs, inputs, str(device), tiny=tiny)
                ours = seconds_of(partial(matmul, x, weights), device, budget=0.05)
                theirs = seconds_of(partial(torch.nn.functional.linear, x, weights), device, budget=0.05)
                report.row(
                    f"our product over cuBLAS, {name}, {rows} rows",
                    theirs / ours,
                    note=f"speed; {1e6 * ours:.0f} us, cuBLAS {1e6 * theirs:.0f} us",
                )


def _engine(report: Report, shape: Shape) -> None:
    options = report.options
    held = engines.held(shape, options, exact=True)
    exact = held.engine.model.exact
    report.row("exact mode is announced", float(exact), note="by the self-check of the start", goal=(1, 1))
    for rows, rate in decode.rates(report, shape, exact=True).items():
        if fast := report.facts.get(f"decode {shape.name} {rows}"):
            report.row(f"exact over fast mode, decode, B = {rows}", rate / fast, goal=limits.EXACT)
    requests = requests_of(shape, options.share, tiny=options.rehearse)
    if report.left < 8:
        return
    found = workload.measure(held.engine, requests, engines.sizes(options).step_tokens, report.left)
    workload.show(report, shape, "exact mode, engine alone", requests, found)
    fast = report.facts.get(f"workload {shape.name} {options.share:g}")
    if fast and found.complete:
        report.row("exact over fast mode, workload", found.rate / fast, goal=limits.EXACT)
    if not exact:
        raise RuntimeError("the self-check did not find the engine exact in exact mode")


def main() -> None:
    """Compare cuBLAS with itself in this process, whose environment keeps it from splitting."""
    device, tiny = json.loads(sys.argv[1])
    matmul = torch.backends.cuda.matmul
    with suppress(AttributeError, RuntimeError):  # built without it
        torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        matmul.allow_bf16_reduced_precision_reduction = (False, False)
    except (TypeError, RuntimeError):  # before torch 2.10
        matmul.allow_bf16_reduced_precision_reduction = False
    print(json.dumps(_compared(torch.nn.functional.linear, device, tiny=tiny)))


if __name__ == "__main__":
    main()
