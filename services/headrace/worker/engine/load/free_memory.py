"""Measure memory: how much can be allocated, how much a function takes, and whether there is enough."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.load.model_files import weight_numbers
from headrace.worker.engine.load.refusals import LoadingError


def free_bytes(device: torch.device) -> int:
    """Return how much can still be allocated on the device; on the CPU within the limits of its cgroups."""
    return (
        cuda.free_device_bytes(device) if device.type == "cuda" else min(free_in_cgroups(), _free_in_system())
    )


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """Call *run*, and return the peak of the memory that it takes beyond what is allocated before."""
    if device.type == "cuda":
        return cuda.peak_device_bytes(device, run)
    # This resets VmHWM to the resident memory. Where it is not permitted, the peak is that of loading: too
    # large, which is safe.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _process_status("VmRSS")
    run()
    return max(_process_status("VmHWM") - before, 0)


@contextlib.contextmanager
def enough_for_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Raise LoadingError if a GPU does not have enough memory for the weights that the block reads."""
    if device.type != "cuda":
        yield
        return
    needed = weight_numbers(folder) * dtype.itemsize
    free = free_bytes(device)
    weights = f"{needed / 2**30:.1f} GiB of weights" if needed else "the weights"
    refused = LoadingError(
        f"{device} has {free / 2**30:.1f} GiB of free memory, too little for {weights}; end other processes "
        "on it, raise --gpu-memory-share if it is below 1, or choose a smaller model or a larger GPU"
    )
    if needed > free:
        raise refused
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise refused from error


@contextlib.contextmanager
def enough_for_steps(device: torch.device, *, step_tokens: int, max_running: int) -> Iterator[None]:
    """Convert a GPU's error of too little memory to LoadingError: the weights fit, but steps do not."""
    try:
        yield
    except RuntimeError as error:
        if not cuda.is_out_of_memory(error):
            raise
        raise LoadingError(
            f"{device} has too little memory for steps of {step_tokens} tokens and {max_running} "
            "sequences besides the weights and KV memory; end other processes on it, or give each a "
            "--gpu-memory-share; else choose smaller --step-tokens and --max-running, a smaller model, or a "
            "larger GPU"
        ) from error


def _process_status(name: str) -> int:
    """Read an entry of /proc/self/status in bytes; 0 if there is none."""
    return _kibibytes(Path("/proc/self/status"), name)


def _kibibytes(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _free_in_system() -> int:
    free = _kibibytes(Path("/proc/meminfo"), "MemAvailable")
    # Systems other than Linux have no such file. A guess is acceptable, since memory is committed lazily.
    return free or 8 << 30


@dataclass(frozen=True, slots=True)
class _Version:
    """The file names of one version of control groups.

    limits   bytes that the group may take; the smallest value applies
    used     bytes that it takes
    unused   entry of memory.stat with the bytes of inactive file pages, which are freed first
    """

    limits: tuple[str, ...]
    used: str
    unused: str


# Above memory.high a group is throttled, at memory.max a process of it is killed.
_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_UNLIMITED = 1 << 62  # bytes; version 1 writes almost 2**63 for no limit


def free_in_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how much the tightest control group of the process still allows, of version 1 and 2.

    root   mount point of control groups; memory groups of version 1 are in root/memory
    own    lists the groups of the process, in lines HIERARCHY:CONTROLLERS:NAME

    The limit of a group applies to all groups inside it, so all parents of the process's groups count too.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return _UNLIMITED
    free = _UNLIMITED
    for _, controllers, name in (line for line in lines if len(line) == 3):
        if not controllers:
            free = min(free, _free_with_parents(root, name, _V2))
        elif "memory" in controllers.split(","):
            free = min(free, _free_with_parents(root / "memory", name, _V1))
    return free


def _free_with_parents(root: Path, name: str, version: _Version) -> int:
    """Return how much a group and all its parents still allow."""
    group = root / name.lstrip("/")
    # In a container, the name may be that of the host, and the group of the container is mounted as the root.
    inside = (root,) if ".." in group.parts else (group, *group.parents)
    folders = [folder for folder in inside if folder.is_relative_to(root)]
    return min((_free_in(folder, version) for folder in folders), default=_UNLIMITED)


def _free_in(folder: Path, version: _Version) -> int:
    limits = [limit for name in version.limits if (limit := _read_number(folder / name)) is not None]
    used = _read_number(folder / version.used)
    if not limits or used is None:
        return _UNLIMITED
    unused = 0
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        unused = next((int(words[1]) for words in lines if words[0] == version.unused), 0)
    return min(max(min(limits) - used + unused, 0), _UNLIMITED)


def _read_number(path: Path) -> int | None:
    """Read a number; None if there is no file, or it holds the word "max"."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None
