"""Describe the card, and measure how fast it copies and multiplies."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import seconds_of

# Bytes per second of the memory of known cards, by their data sheets; the key is part of the name.
DATASHEETS = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 80GB HBM3": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A800-SXM4-80GB": 2.039e12,
    "L40S": 0.864e12,
}
_PACKAGES = ("torch", "triton", "transformers", "numpy", "numba", "vllm")


def run(report: Report, shape: Shape | None) -> None:
    """Measure the card."""
    device = torch.device(report.options.device)
    report.fact("versions", machine.versions(*_PACKAGES))
    host = machine.describe()
    report.fact("host", host)
    name = str(host["cpu"])
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        report.row("memory", properties.total_memory / 2**30, "GiB")
        report.row(
            "compute capability",
            float(f"{properties.major}.{properties.minor}"),
            note=f"{properties.multi_processor_count} multiprocessors, driver {_driver()}",
        )
    report.fact("card", name)
    report.row("name", note=name)
    copied, flops = _copy(device, report.options.rehearse), _multiply(device, report.options.rehearse)
    listed = next((rate for key, rate in DATASHEETS.items() if key in name), None)
    report.fact("copy", copied)
    report.fact("bandwidth", listed or copied)
    report.fact("flops", flops)
    report.row("copy within its memory", copied / 1e9, "GB/s", limit=listed and listed / 1e9)
    report.row("product of bfloat16 matrices", flops / 1e12, "TFLOP/s")
    report.row(
        "bandwidth of the limits of steps and the workload",
        (listed or copied) / 1e9,
        "GB/s",
        note="by the data sheet" if listed else "as measured: the data sheet of this card is not known here",
    )
    report.row("replay of a graph of one kernel", 1e6 * _launch(device), "us")
    report.row("launch of a kernel from Python", 1e6 * _eager(device), "us")


def _copy(device: torch.device, small: bool) -> float:
    source = torch.ones(1 << (20 if small else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)


def _multiply(device: torch.device, small: bool) -> float:
    size = 256 if small else 8192
    dtype = torch.float32 if small else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return float(2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, budget=1.0))


def _launch(device: torch.device) -> float:
    tensor = torch.zeros(16, device=device)
    return seconds_of(lambda: tensor.add_(1), device)


def _eager(device: torch.device) -> float:
    tensor = torch.zeros(16, device=device)
    tensor.add_(1)
    began = time.perf_counter()
    for _ in range(200):
        tensor.add_(1)
    seconds = (time.perf_counter() - began) / 200
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return seconds


def _driver() -> str:
    """Return the version of the driver, from the kernel module or from nvidia-smi; empty if unknown."""
    with suppress(OSError, IndexError):
        text = Path("/proc/driver/nvidia/version").read_text()
        return next(word for word in text.split() if word[:1].isdigit() and "." in word)
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()[0]
        )
    return ""
